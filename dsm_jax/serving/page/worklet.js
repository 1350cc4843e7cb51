// On the browser's audio thread: cut what the microphone gives into frames of 80 ms at the model's rate.

import { Resampler } from "./resample.js";

const RATE = 24000;
const FRAME = 1920;

/** Posts each frame as a Float32Array. Told anything, it posts the rest, then null, and ends. */
class Cutter extends AudioWorkletProcessor {
  #frame = new Float32Array(FRAME);
  #filled = 0;
  #ended = false;
  #resampler = sampleRate === RATE ? null : new Resampler(sampleRate, RATE);

  constructor() {
    super();
    this.port.onmessage = () => this.#finish();
  }

  process([[samples]]) {
    if (samples && !this.#ended) this.#cut(this.#resampler ? this.#resampler.push(samples) : samples);
    return !this.#ended;
  }

  #cut(samples) {
    for (let at = 0; at < samples.length; ) {
      const part = samples.subarray(at, at + FRAME - this.#filled);
      this.#frame.set(part, this.#filled);
      this.#filled += part.length;
      at += part.length;
      if (this.#filled === FRAME) this.#post();
    }
  }

  #post() {
    this.port.postMessage(this.#frame.slice(0, this.#filled));
    this.#filled = 0;
  }

  #finish() {
    if (this.#ended) return;
    if (this.#resampler) this.#cut(this.#resampler.finish());
    if (this.#filled) this.#post();
    this.#ended = true;
    this.port.postMessage(null);
  }
}

registerProcessor("cutter", Cutter);
