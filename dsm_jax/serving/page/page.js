// The page: what the server serves, its key, and the keyboard.

import { byId } from "./dom.js";
import { ListenPanel } from "./listen.js";
import { KeyError, models, useKey, voices } from "./server.js";
import { SpeakPanel } from "./speak.js";

const listen = new ListenPanel({ onKey: askForKey });
const speak = new SpeakPanel({ onKey: askForKey });

/** Ask the server what it serves, and set the panels up for it. */
async function load() {
  byId("notice").hidden = true;
  let found;
  try {
    found = await models();
  } catch (error) {
    byId("served").textContent = "";
    if (error instanceof KeyError) return askForKey(error);
    byId("notice-text").textContent = error.message;
    byId("notice").hidden = false;
    return;
  }
  byId("key-form").hidden = true;
  byId("served").textContent = found.map((model) => model.name).join(" · ");
  const names = found.some((model) => model.kind === "tts") ? await voices() : [];
  choose("listen-model", found.filter((model) => model.kind === "stt"), (model) => listen.use(model));
  choose("speak-model", found.filter((model) => model.kind === "tts"), (model) => speak.use(model, names));
}

/** Let the user choose among models where there are several. */
function choose(id, found, use) {
  const select = byId(id);
  select.replaceChildren(...found.map((model, n) => new Option(model.name, n)));
  select.hidden = found.length < 2;
  select.onchange = () => use(found[select.value]);
  use(found[0] ?? null);
}

function askForKey(error) {
  byId("key-text").textContent = error.message;
  byId("key-form").hidden = false;
  byId("key").value = "";
  byId("key").focus();
}

byId("retry").onclick = load;
byId("key-form").onsubmit = (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  load().then(() => byId("key-form").hidden && byId("mic").focus());
};

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && speak.running) speak.stop();
  // Space presses a button that has the focus, and writes in a field: those keep it.
  const own = event.target.closest?.("button, input, textarea, select, a, [contenteditable]");
  if (event.key !== " " || event.repeat || event.ctrlKey || event.altKey || event.metaKey || own) return;
  event.preventDefault(); // the page would scroll
  listen.toggle();
});

addEventListener("pagehide", () => speak.stop());

load();
