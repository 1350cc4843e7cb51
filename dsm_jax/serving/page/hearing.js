// One session of speech to text: samples go to the server, its messages to the transcript.

import { UnreachableError, open } from "./server.js";
import { encode, encodeAudio } from "./wire.js";

export const RATE = 24000;
export const FRAME = 1920;
const FRAME_BYTES = 9619; // of a frame's message
const LAST = 1; // number of the marker behind all audio

/** Callbacks: `ready` when the server has a place, `step` after each frame, `end` once, with an Error or null. */
export class Hearing {
  /** Frames that were sent, and seconds of audio that were sent or transcribed. */
  frames = 0;
  sent = 0;
  heard = 0;
  #socket;
  #waiting = []; // messages of the time before the socket is open
  #transcript;
  #on;
  #late = 0; // samples that wait on the server
  #finishing = false;
  #over = false;

  constructor(path, transcript, { wait = false, ...on }) {
    this.#transcript = transcript;
    this.#on = on;
    transcript.begin();
    this.#socket = open(path, wait ? { wait: "1" } : {}, {
      message: (message) => this.#read(message),
      end: (error) => this.#end(error),
    });
    this.#socket.addEventListener("open", () => {
      for (const message of this.#waiting.splice(0)) this.#socket.send(message);
    });
  }

  /** Send samples, Float32Array of 24 kHz. */
  push(samples) {
    if (!this.wants) return;
    this.frames += 1;
    this.sent += samples.length / RATE;
    this.#send(encodeAudio(samples));
  }

  /** Ask for the last words; the session ends when they have come. */
  finish() {
    if (!this.wants) return;
    this.#finishing = true;
    this.#send(encode({ type: "Marker", id: LAST, flush: true }));
  }

  /** Leave at once. */
  cancel() {
    this.#end(null);
  }

  /** Whether the session takes samples. */
  get wants() {
    return !this.#finishing && !this.#over;
  }

  /** Seconds of audio that were sent and are not transcribed, beyond the frame that is on its way. */
  get behind() {
    return this.#late / RATE + (this.#socket.bufferedAmount / FRAME_BYTES) * (FRAME / RATE);
  }

  #send(message) {
    if (this.#socket.readyState === WebSocket.CONNECTING) this.#waiting.push(message);
    else if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(message);
  }

  #read(message) {
    if (this.#over) return;
    if (message.type === "Ready") this.#on.ready?.();
    else if (message.type === "Marker") {
      if (message.id === LAST) this.#end(null);
    } else {
      this.#transcript.read(message);
      if (message.type === "Step") {
        this.heard += FRAME / RATE;
        this.#late = message.buffered_pcm;
      }
      this.#on.step?.(message);
    }
  }

  #end(error) {
    if (this.#over) return;
    this.#over = true;
    this.#socket.close(1000);
    this.#transcript.finish();
    this.#on.end?.(error);
  }
}

/** Open the microphone; `frame` gets its frames, `lost` is called if it goes away. Returns a function that closes it,
 * once the last samples have come. */
export async function openMicrophone({ frame, lost }) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const [track] = stream.getAudioTracks();
  let context;
  const release = () => {
    track.stop();
    return context?.close();
  };
  try {
    let source;
    try {
      context = new AudioContext({ sampleRate: RATE });
      source = context.createMediaStreamSource(stream);
    } catch (error) {
      if (error.name !== "NotSupportedError") throw error;
      await context?.close();
      context = new AudioContext(); // of the microphone's rate, as Firefox wants it: the worklet resamples
      source = context.createMediaStreamSource(stream);
    }
    await context.audioWorklet.addModule("worklet.js").catch((error) => {
      throw error.name === "AbortError" ? new UnreachableError() : error; // the file could not be fetched
    });
    const cutter = new AudioWorkletNode(context, "cutter", {
      channelCount: 1,
      channelCountMode: "explicit",
    });
    const emptied = new Promise((resolve) => {
      cutter.port.onmessage = ({ data }) => (data === null ? resolve() : frame(data));
    });
    source.connect(cutter).connect(context.destination); // silence: some browsers run only what leads there
    await context.resume();
    track.onended = lost;
    return async () => {
      track.onended = null;
      cutter.port.postMessage("finish");
      await emptied;
      await release();
    };
  } catch (error) {
    await release();
    throw error;
  }
}

/** Return the samples of an audio file, mono at 24 kHz. */
export async function decodeFile(file) {
  let sound;
  try {
    sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`“${file.name}” cannot be decoded: this browser does not know it as audio.`);
  }
  const mono = sound.getChannelData(0).slice();
  for (let channel = 1; channel < sound.numberOfChannels; channel++) {
    const other = sound.getChannelData(channel);
    for (let n = 0; n < mono.length; n++) mono[n] += other[n];
  }
  return mono.map((sample) => sample / sound.numberOfChannels);
}

/** Send samples as fast as the server takes them; what waits in this browser stays small. */
export async function sendAll(hearing, samples) {
  for (let at = 0; at < samples.length && hearing.wants; at += FRAME) {
    while (hearing.wants && hearing.sent - hearing.heard > 20) await new Promise((resolve) => setTimeout(resolve, 10));
    hearing.push(samples.slice(at, at + FRAME));
  }
  hearing.finish();
}
