// The panel that listens: microphone or file, live words, and what can be done with them.

import { Hearing, decodeFile, openMicrophone, sendAll } from "./hearing.js";
import { KeyError } from "./server.js";
import { Transcript, toJson, toSrt, toText } from "./transcript.js";
import { byId, describe, saveAs } from "./dom.js";

const SENTENCES = {
  absent: "This server serves no model that transcribes.",
  idle: "Press the microphone and speak.",
  asking: "Allow this page to use the microphone.",
  decoding: "Reading the file …",
  connecting: "Connecting …",
  waiting: "Waiting for a free place on the server …",
  live: "Listening. Press again to stop.",
  file: "Transcribing the file. Press again to stop.",
  finishing: "Waiting for the last words …",
};
const RUNNING = ["asking", "decoding", "connecting", "waiting", "live", "file", "finishing"];
const QUIETEST_DB = -60; // of the meter

export class ListenPanel {
  #model = null;
  #state = "idle";
  #transcript = new Transcript();
  #shown = 0; // finished words on the page
  #marked = -1; // number of the last word with a mark of a pause behind it
  #run = null; // what goes on: {hearing, closeMicrophone, file}
  #file = null; // name of the last file
  #again = null; // does once more what has failed
  #onKey;

  /** `onKey` is called with a KeyError when the server asks for a key. */
  constructor({ onKey }) {
    this.#onKey = onKey;
    byId("mic").onclick = () => this.toggle();
    byId("reconnect").onclick = () => this.#again();
    byId("open-file").onclick = () => byId("file").click();
    byId("file").onchange = ({ target }) => {
      const [file] = target.files;
      target.value = ""; // so that the same file can be chosen again
      if (file) this.openFile(file);
    };
    byId("clear").onclick = () => this.#clear();
    byId("copy").onclick = () => this.#copy();
    const name = () => this.#file?.replace(/\.\w+$/, "") ?? "transcript";
    byId("save-txt").onclick = () => saveAs(`${name()}.txt`, "text/plain", toText(this.#transcript));
    byId("save-srt").onclick = () => saveAs(`${name()}.srt`, "application/x-subrip", toSrt(this.#transcript.words));
    byId("save-json").onclick = () => {
      const about = { model: this.#model?.name, audio: this.#file };
      saveAs(`${name()}.json`, "application/json", toJson(this.#transcript, about));
    };
    this.#takeDrops();
    this.#show("idle");
  }

  /** Use a model {name, path}, or none. */
  use(model) {
    this.#model = model;
    const demo = model?.name.startsWith("digits");
    byId("listen-hint").textContent = demo ? "The demo model knows English digits only." : "";
    if (!RUNNING.includes(this.#state)) this.#show(model ? "idle" : "absent");
  }

  get running() {
    return RUNNING.includes(this.#state);
  }

  /** Start with the microphone, or stop; stop for good while the last words are awaited. */
  toggle() {
    if (byId("mic").disabled) return;
    if (!this.running) this.#listen();
    else if (["live", "file", "waiting"].includes(this.#state) && this.#run?.hearing) this.#finish();
    else this.#leave();
  }

  async openFile(file) {
    if (this.running || !this.#model) return;
    const run = this.#begin("decoding", () => this.openFile(file));
    this.#file = run.file = file.name;
    try {
      const samples = await decodeFile(file);
      if (run !== this.#run) return;
      run.seconds = samples.length / 24000;
      this.#connect(run, { wait: true });
      await sendAll(run.hearing, samples);
      if (run === this.#run && this.#state === "file") this.#show("finishing");
    } catch (error) {
      this.#fail(run, error);
    }
  }

  async #listen() {
    const run = this.#begin("asking", () => this.#listen());
    this.#file = null;
    try {
      const close = await openMicrophone({
        frame: (samples) => this.#frame(run, samples),
        lost: () => run === this.#run && this.#finish(),
      });
      run.closeMicrophone = close;
      if (run !== this.#run) return await close();
      this.#connect(run);
    } catch (error) {
      this.#fail(run, error);
    }
  }

  #begin(state, again) {
    this.#again = again;
    this.#run = { hearing: null, closeMicrophone: null, file: null, early: [] };
    this.#elapsed(0);
    this.#show(state);
    return this.#run;
  }

  #connect(run, { wait = false } = {}) {
    this.#show("connecting");
    run.hearing = new Hearing(this.#model.path, this.#transcript, {
      wait,
      ready: () => run === this.#run && this.#state !== "finishing" && this.#show(run.file ? "file" : "live"),
      step: () => this.#update(run),
      end: (error) => (error ? this.#fail(run, error) : this.#done(run)),
    });
    for (const samples of run.early.splice(0)) run.hearing.push(samples); // of the time before there was a session
    if (wait) setTimeout(() => run === this.#run && this.#state === "connecting" && this.#show("waiting"), 500);
  }

  /** Take a frame of the microphone. */
  #frame(run, samples) {
    if (run.hearing) run.hearing.push(samples);
    else run.early.push(samples);
    if (run !== this.#run) return;
    const peak = samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
    this.#level(Math.max(0, 1 - (20 * Math.log10(peak + 1e-9)) / QUIETEST_DB));
    this.#elapsed(run.hearing?.sent ?? 0);
  }

  /** Stop taking audio, and wait for the last words. */
  async #finish() {
    const run = this.#run;
    this.#show("finishing");
    await this.#close(run);
    run.hearing?.finish();
  }

  /** Stop at once. */
  #leave() {
    const run = this.#run;
    if (run.hearing) run.hearing.cancel();
    else this.#done(run);
  }

  #done(run) {
    if (run !== this.#run) return;
    this.#release(run);
    const { length } = this.#transcript.words;
    this.#show("idle", length ? `${length} ${length === 1 ? "word" : "words"}. Press the microphone to go on.` : undefined);
  }

  #fail(run, error) {
    if (run !== this.#run) return;
    run.hearing?.cancel();
    this.#release(run);
    this.#show("error", describe(error));
    byId("reconnect").textContent = run.hearing ? "Reconnect" : "Try again";
    if (error instanceof KeyError) this.#onKey(error);
  }

  #release(run) {
    this.#run = null;
    this.#close(run);
    this.#render();
  }

  /** Close the microphone, once its last samples were taken. */
  async #close(run) {
    const close = run.closeMicrophone;
    run.closeMicrophone = null;
    this.#level(0);
    await close?.();
    this.#level(0); // the last frames have moved it
  }

  /** Show what a step has brought. */
  #update(run) {
    this.#render();
    const { hearing } = run;
    if (run.file) {
      byId("progress").value = Math.min(1, hearing.heard / run.seconds);
      this.#elapsed(hearing.heard);
    }
    const late = run.file ? 0 : hearing.behind;
    byId("behind").hidden = late < 1;
    byId("behind").textContent = `${late.toFixed(1)} s behind`;
  }

  #show(state, sentence = SENTENCES[state]) {
    this.#state = state;
    byId("listen").dataset.state = state;
    byId("reconnect").hidden = state !== "error";
    const running = this.running;
    byId("listen-state").textContent = sentence;
    byId("mic").setAttribute("aria-pressed", String(running));
    const noMicrophone = !navigator.mediaDevices;
    byId("mic").disabled = !this.#model || (noMicrophone && !running);
    byId("secure").hidden = !noMicrophone;
    byId("open-file").disabled = running || !this.#model;
    byId("progress").hidden = !(this.#run?.file && running);
    byId("bar").hidden = !byId("progress").hidden;
    if (!running) byId("behind").hidden = true;
    if (!running || state === "decoding") byId("progress").value = 0;
    this.#enableTools();
  }

  #enableTools() {
    const none = this.#transcript.words.length === 0;
    for (const id of ["copy", "save-txt", "save-srt", "save-json"]) byId(id).disabled = none;
    byId("clear").disabled = none || this.running;
  }

  /** Bring the words on the page up to date. */
  #render() {
    const { words } = this.#transcript;
    const [finished, box] = [byId("finished"), byId("transcript")];
    const follow = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    for (; this.#shown < words.length && words[this.#shown].end !== null; this.#shown++) {
      this.#markPause(this.#shown - 1);
      const word = words[this.#shown];
      const span = document.createElement("span");
      span.className = "word";
      span.textContent = word.text;
      span.title = `${word.start.toFixed(2)} to ${word.end.toFixed(2)} s`;
      finished.append(span, " ");
    }
    if (this.#shown === words.length) this.#markPause(this.#shown - 1);
    const partial = words.slice(this.#shown).map((word) => word.text).join(" ");
    if (byId("partial").textContent !== partial) byId("partial").textContent = partial;
    byId("empty").hidden = words.length > 0;
    if (follow) box.scrollTop = box.scrollHeight;
    this.#enableTools();
  }

  #markPause(number) {
    if (number <= this.#marked || !this.#transcript.pauseAfter(number)) return;
    this.#marked = number;
    const mark = document.createElement("span");
    mark.className = "pause";
    mark.title = "pause";
    mark.setAttribute("aria-hidden", "true"); // a screen reader reads the words alone
    byId("finished").append(mark, " ");
  }

  #level(value) {
    byId("level").value = value;
    byId("listen").style.setProperty("--level", value.toFixed(2));
  }

  #elapsed(seconds) {
    const whole = Math.floor(seconds);
    byId("elapsed").textContent = `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
  }

  #clear() {
    this.#transcript = new Transcript();
    this.#shown = 0;
    this.#marked = -1;
    byId("finished").replaceChildren();
    this.#elapsed(0);
    this.#render();
    byId("mic").focus();
  }

  async #copy() {
    const text = toText(this.#transcript);
    try {
      await navigator.clipboard.writeText(text);
      this.#told("Copied.");
    } catch {
      // Without a secure context there is no clipboard: the words are selected, for the browser's own command.
      getSelection().selectAllChildren(byId("finished"));
      this.#told("Selected: copy with your browser’s own command.");
    }
  }

  #told(sentence) {
    byId("tool-state").textContent = sentence;
    setTimeout(() => (byId("tool-state").textContent = ""), 4000);
  }

  #takeDrops() {
    const panel = byId("listen");
    const hasFile = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!hasFile(event)) return;
      event.preventDefault();
      panel.classList.add("dropping");
    });
    addEventListener("dragleave", (event) => event.relatedTarget ?? panel.classList.remove("dropping"));
    addEventListener("drop", (event) => {
      if (!hasFile(event)) return;
      event.preventDefault(); // the browser would leave the page for the file
      panel.classList.remove("dropping");
      this.openFile(event.dataTransfer.files[0]);
    });
  }
}
