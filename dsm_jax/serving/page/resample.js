// Change the sample rate of a live stream by a windowed sinc: for browsers that give the microphone at its own rate.

const LOBES = 16; // of the sinc on each side of a sample, at the lower of both rates
const PASSED = 0.92; // of the lower rate's band; what lies above fades out

/** Resample a stream; the pieces may be of any size, and what comes out does not depend on the sizes. */
export class Resampler {
  #up; // the rates' ratio in lowest terms: output samples per `down` input samples
  #down;
  #scale;
  #reach; // input samples on each side that an output sample is made of
  #kernels = new Map(); // by phase
  #kept; // input that is still needed
  #place; // of the next output sample: in what is kept, and `phase / up` of a sample later
  #phase = 0;

  constructor(from, to) {
    const common = divisor(from, to);
    this.#up = to / common;
    this.#down = from / common;
    this.#scale = Math.min(1, to / from) * PASSED;
    this.#reach = Math.ceil(LOBES / this.#scale);
    this.#kept = new Float32Array(this.#reach); // silence before the start
    this.#place = this.#reach;
  }

  /** Return the samples that a further piece, Float32Array, completes. */
  push(piece) {
    const input = new Float32Array(this.#kept.length + piece.length);
    input.set(this.#kept);
    input.set(piece, this.#kept.length);
    const output = [];
    while (this.#place + this.#reach < input.length) {
      output.push(this.#sample(input));
      this.#phase += this.#down;
      this.#place += Math.floor(this.#phase / this.#up);
      this.#phase %= this.#up;
    }
    const drop = Math.min(this.#place - this.#reach, input.length);
    this.#kept = input.slice(drop);
    this.#place -= drop;
    return Float32Array.from(output);
  }

  /** Return the last samples, which silence completes. */
  finish() {
    return this.push(new Float32Array(this.#reach));
  }

  #sample(input) {
    const kernel = this.#kernel();
    let sum = 0;
    for (let n = 0, at = this.#place - this.#reach; n < kernel.length; n++, at++) sum += kernel[n] * input[at];
    return sum;
  }

  #kernel() {
    const phase = this.#phase;
    let kernel = this.#kernels.get(phase);
    if (!kernel) {
      kernel = Float64Array.from({ length: 2 * this.#reach + 1 }, (_, n) => this.#weight(n - this.#reach - phase / this.#up));
      const sum = kernel.reduce((a, b) => a + b);
      kernel = kernel.map((weight) => weight / sum); // a constant stays what it was
      this.#kernels.set(phase, kernel);
    }
    return kernel;
  }

  /** Return the weight of an input sample `x` samples away. */
  #weight(x) {
    if (Math.abs(x) >= this.#reach) return 0;
    const angle = Math.PI * this.#scale * x;
    const phase = (Math.PI * x) / this.#reach;
    const window = 0.42 + 0.5 * Math.cos(phase) + 0.08 * Math.cos(2 * phase); // Blackman
    return window * (angle === 0 ? 1 : Math.sin(angle) / angle);
  }
}

function divisor(a, b) {
  return b === 0 ? a : divisor(b, a % b);
}
