// The server that this page came from: its models, the key for it, sockets, and sentences for what can go wrong.

import { decode } from "./wire.js";

const KEY = "dsm-jax key"; // in the storage of this tab alone

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function useKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** Fetch an address of the server, with the key if there is one. */
export function get(path) {
  return fetch(path, { headers: key() ? { authorization: `Bearer ${key()}` } : {}, cache: "no-store" });
}

/** Refused for want of a key, or for a wrong one. */
export class KeyError extends Error {}

export class UnreachableError extends Error {
  constructor() {
    super("The server cannot be reached. Is it still running?");
  }
}

/** Return the models that are served: {kind: "stt" or "tts", name, path}. */
export async function models() {
  const answer = await reached(get("/api/modules_info"));
  if (answer.status === 401) throw new KeyError(keySentence());
  if (!answer.ok) throw new Error(`The server answered ${answer.status} to the question what it serves.`);
  const kinds = { batched_asr: "stt", py_batched_asr: "stt", py: "tts" };
  return (await answer.json())
    .map((module) => ({ kind: kinds[module.type], name: module.lm ?? module.script, path: module.path }))
    .filter((model) => model.kind);
}

/** Return the server's voices {id, model, chosen}, `chosen` for a model's default; none where it does not tell. */
export async function voices() {
  const answer = await get("/v1/audio/voices").catch(() => null);
  if (!answer?.ok) return [];
  const content = await answer.json();
  const list = Array.isArray(content) ? content : (content.data ?? content.voices ?? []);
  return list
    .map((voice) => (typeof voice === "string" ? { id: voice } : { ...voice, id: voice.id ?? voice.name }))
    .map(({ id, model, default: chosen }) => ({ id, model, chosen: chosen === true }))
    .filter(({ id }) => id);
}

/** Open a socket of a model. The callbacks: `message` for each message, and `end` once, with an Error, or null if the
 * session came to its proper end. */
export function open(path, query, { message, end }) {
  const address = new URL(path, location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  for (const [name, value] of Object.entries({ ...query, auth_id: key() })) {
    if (value) address.searchParams.set(name, value);
  }
  const socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  let opened = false;
  let said = null; // the server's own sentence
  socket.onopen = () => (opened = true);
  socket.onmessage = ({ data }) => {
    let content;
    try {
      content = decode(data);
    } catch (error) {
      said = error.message;
      socket.close(4000, "bad message");
      return;
    }
    if (content.type === "Error") said = content.message;
    else message(content);
  };
  socket.onclose = async ({ code, reason }) => {
    if (code === 1000 && said === null) end(null);
    else end(opened ? new Error(ended(code, said ?? reason)) : await refused());
  };
  return socket;
}

/** Return a sentence for the end of a session that had begun. */
function ended(code, said) {
  const advice = {
    1001: "The server is shutting down.",
    1012: "The server is shutting down.",
    1006: "The connection was lost.",
    1011: "The server has failed.",
    1013: "The server is full: all of its places are taken. Try again in a moment.",
    4000: "The server sent a message that this page cannot read.",
  }[code];
  const own = said && (code === 4000 ? `(${said})` : `The server says: “${said}”.`);
  return [advice, own].filter(Boolean).join(" ") || `The server ended the session (code ${code}).`;
}

/** Return the Error of a socket that did not open; browsers do not tell a page why, so that the server is asked. */
async function refused() {
  try {
    if ((await reached(get("/api/modules_info"))).status === 401) return new KeyError(keySentence());
    const ready = await reached(get("/readyz"));
    if (ready.status === 503) {
      return new Error(`The server is shutting down or not ready. It says: “${await ready.text()}”.`);
    }
  } catch (error) {
    return error;
  }
  return new Error(
    "The server refused the connection. If it is behind a proxy, the proxy must pass on websockets and the host.",
  );
}

async function reached(asked) {
  try {
    return await asked;
  } catch {
    throw new UnreachableError();
  }
}

function keySentence() {
  return key() ? "The server does not know this key." : "This server needs a key.";
}
