// The panel that speaks: text to the server, sound from it, and the words lit as they are said.

import { byId, describe, saveAs } from "./dom.js";
import { KeyError, open } from "./server.js";
import { encode } from "./wire.js";
import { wav } from "./wav.js";

const RATE = 24000;
const AHEAD_S = 0.1; // of the sound's start, so that a late frame is not heard as a gap
const SENTENCES = {
  absent: "This server serves no model that speaks.",
  idle: "",
  connecting: "Connecting …",
  speaking: "Speaking …",
};
const DIGITS = "one two three four five six seven eight nine zero";
const GREETING = "Hello! This voice is made while you listen to it, word by word.";

export class SpeakPanel {
  #model = null;
  #run = null; // what goes on: {socket, context, frames, places, end, words, done, began}
  #frames = []; // of the last speech
  #onKey;

  /** `onKey` is called with a KeyError when the server asks for a key. */
  constructor({ onKey }) {
    this.#onKey = onKey;
    byId("say").onclick = () => this.speak();
    byId("hush").onclick = () => this.stop();
    byId("save-wav").onclick = () => saveAs("speech.wav", "audio/wav", wav(this.#frames, RATE));
    byId("text").oninput = () => this.#enable();
    byId("text").onkeydown = (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.speak();
    };
    this.#show("idle");
  }

  /** Use a model {name, path}, or none; of the voices {id, model, chosen} it has those that name it, or no model. */
  use(model, voices) {
    const own = voices.filter((voice) => !voice.model || voice.model === model?.name);
    const text = byId("text");
    const demo = model?.name.startsWith("digits");
    if (model && (text.value === "" || [DIGITS, GREETING].includes(text.value))) text.value = demo ? DIGITS : GREETING;
    byId("speak-hint").textContent = demo ? "The demo model says English digits only." : "";
    text.disabled = !model;
    byId("voice-field").hidden = own.length === 0;
    byId("voice").replaceChildren(...own.map(({ id, chosen }) => new Option(id, id, chosen, chosen)));
    if (!own.some(({ chosen }) => chosen)) byId("voice").prepend(new Option("Default", "", true, true));
    this.#model = model;
    this.#show(model ? "idle" : "absent");
  }

  get running() {
    return this.#run !== null;
  }

  async speak() {
    if (byId("say").disabled) return;
    const text = byId("text").value.trim();
    const run = (this.#run = { frames: [], places: [], end: 0, words: [], done: false, began: performance.now() });
    this.#frames = run.frames;
    this.#write(run, text);
    this.#show("connecting");
    try {
      run.context = new AudioContext({ sampleRate: RATE });
      await run.context.resume();
      if (run !== this.#run) return;
      const query = { format: "PcmMessagePack", voice: byId("voice").value };
      run.socket = open(this.#model.path, query, {
        message: (message) => run === this.#run && this.#read(run, message),
        end: (error) => this.#ended(run, error),
      });
      run.socket.addEventListener("open", () => {
        run.socket.send(encode({ type: "Text", text }));
        run.socket.send(encode({ type: "Eos" }));
      });
    } catch (error) {
      this.#ended(run, error);
    }
  }

  /** Stop at once. */
  stop() {
    const run = this.#run;
    if (!run) return;
    this.#release(run);
    this.#show("idle");
  }

  #read(run, message) {
    if (message.type === "Audio") this.#play(run, Float32Array.from(message.pcm));
    else if (message.type === "Text") this.#place(run, message);
  }

  /** Append a frame to the sound that is scheduled. */
  #play(run, samples) {
    const { context, frames, places } = run;
    const buffer = new AudioBuffer({ length: samples.length, sampleRate: RATE });
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(context.destination);
    const heard = (places.at(-1)?.sound ?? 0) + (places.at(-1)?.seconds ?? 0);
    if (run.end < context.currentTime) run.end = context.currentTime + AHEAD_S; // the start, or a gap
    source.start(run.end);
    places.push({ at: run.end, sound: heard, seconds: buffer.duration });
    run.end += buffer.duration;
    frames.push(samples);
    if (frames.length === 1) {
      const seconds = (performance.now() - run.began) / 1000;
      this.#show("speaking", `Speaking. First sound after ${seconds.toFixed(2)} s.`);
      this.#light(run);
    }
  }

  /** Return the context's time of what the listener hears now. */
  #now({ context }) {
    return context.currentTime - (context.outputLatency || 0);
  }

  /** Return the place in the sound that is heard now, seconds. */
  #heard(run) {
    const now = this.#now(run);
    const place = run.places.findLast(({ at }) => at <= now);
    return place ? place.sound + Math.min(place.seconds, now - place.at) : 0;
  }

  /** Light the words up to what is heard, until all is. */
  #light(run) {
    if (run !== this.#run) return;
    const now = this.#heard(run);
    for (const { element, start, stop } of run.words) {
      if (start === null) continue;
      element.classList.toggle("now", start <= now && now < stop);
      element.classList.toggle("said", now >= start);
    }
    if (run.done && this.#now(run) >= run.end) {
      for (const { element, start } of run.words) {
        element.classList.remove("now");
        element.classList.toggle("said", start !== null);
      }
      this.#release(run);
      this.#show("idle", "Finished.");
    } else requestAnimationFrame(() => this.#light(run));
  }

  /** Write the text's words on the page, unlit. */
  #write(run, text) {
    const box = byId("spoken");
    box.replaceChildren();
    for (const piece of text.match(/<break[^>]*>|\S+/g) ?? []) {
      if (piece.startsWith("<break")) continue;
      const element = document.createElement("span");
      element.className = "word";
      element.textContent = piece;
      box.append(element, " ");
      run.words.push({ element, text: piece, start: null, stop: null });
    }
    box.hidden = false;
  }

  /** Give a word its times. The server's words are the text's, in order; it may leave out some. */
  #place(run, { text, start_s, stop_s }) {
    if (text.startsWith("<break")) return;
    const rest = run.words.slice(run.words.findLastIndex((word) => word.start !== null) + 1);
    const word = rest.find((candidate) => bare(candidate.text) === bare(text)) ?? rest[0];
    if (!word) return;
    word.start = start_s;
    word.stop = stop_s;
  }

  #ended(run, error) {
    if (run !== this.#run) return;
    run.done = true;
    if (!error && run.frames.length > 0) return; // what was sent is still played
    this.#release(run);
    this.#show(error ? "error" : "idle", error ? describe(error) : "There was nothing to say.");
    if (error instanceof KeyError) this.#onKey(error);
  }

  #release(run) {
    this.#run = null;
    run.socket?.close(1000);
    run.context?.close();
  }

  #show(state, sentence = SENTENCES[state]) {
    byId("speak").dataset.state = state;
    byId("speak-state").textContent = sentence;
    byId("say").setAttribute("aria-pressed", String(this.running));
    this.#enable();
  }

  #enable() {
    byId("say").disabled = this.running || !this.#model || byId("text").value.trim() === "";
    byId("hush").disabled = !this.running;
    byId("save-wav").disabled = this.running || this.#frames.length === 0;
  }
}

function bare(word) {
  return word.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
}
