// The words of a transcript with their times, and the formats that it is saved in. Nothing here touches the page.

const PAUSE = 0.5; // probability of silence over the next 2 s from which the model is taken to hear a pause
const GAP_S = 1; // between two words, which is a pause too: some models predict none

// Subtitles: the rules of dsm_jax/stt/subtitles.py, to the byte.
const LINE = 42;
const LINES = 2;
const MIN_SENTENCE_S = 1;
const MAX_CUE_MS = 7000;
const MIN_CUE_MS = 300;

/** The words that were heard in one or several sessions; the times of each session follow those before it. */
export class Transcript {
  /** Words {text, start, end} in order; `end` is null while a word is not complete. */
  words = [];
  /** Predicted pauses {time, horizon, probability}: one for each time that the probability rises. */
  pauses = [];
  /** Seconds of audio that were transcribed. */
  duration = 0;
  #offset = 0;
  #pausing = false;

  /** Begin a session. */
  begin() {
    this.#offset = Math.max(this.duration, this.words.at(-1)?.end ?? 0);
    this.#pausing = false;
  }

  /** Take a message of the server. */
  read(message) {
    switch (message.type) {
      case "Word":
        return this.#begins(message.text, message.start_time + this.#offset);
      case "EndWord":
        return this.#ends(message.stop_time + this.#offset);
      case "Step":
        return this.#heard(message.step_idx, message.prs);
    }
  }

  /** End a session: what is not complete will not be. */
  finish() {
    while (this.open) this.#ends(Math.max(this.duration, this.open.start));
  }

  /** The first word that is not complete. */
  get open() {
    return this.words.find((word) => word.end === null);
  }

  get text() {
    return joined(this.words);
  }

  /** Tell whether there is a pause between the word of a number and the one after it, or after the last word. */
  pauseAfter(number) {
    const [word, next] = [this.words[number], this.words[number + 1]];
    if (!word) return false;
    const until = next?.start ?? Infinity;
    if (this.pauses.some((pause) => pause.time > word.start && pause.time <= until)) return true;
    return next !== undefined && word.end !== null && next.start - word.end > GAP_S;
  }

  #begins(text, start) {
    // A further message with a start that is known brings the rest of that word.
    const known = this.words.find((word) => word.end === null && word.start === start);
    if (known) known.text += text;
    else this.words.push({ text, start, end: null });
  }

  #ends(end) {
    const word = this.open;
    if (word) word.end = Math.max(end, word.start);
  }

  #heard(index, prs) {
    this.duration = this.#offset + (index + 1) * 0.08;
    const probability = prs[2] ?? 0;
    if (probability > PAUSE && !this.#pausing) {
      this.pauses.push({ time: this.duration, horizon: 2, probability });
    }
    this.#pausing = probability > PAUSE;
  }
}

function joined(words) {
  return words.map((word) => word.text.trim()).filter(Boolean).join(" ");
}

/** Return the text of a transcript, a line between two pauses. */
export function toText(transcript) {
  const lines = [[]];
  transcript.words.forEach((word, number) => {
    lines.at(-1).push(word);
    if (transcript.pauseAfter(number)) lines.push([]);
  });
  return lines.map(joined).filter(Boolean).map((line) => line + "\n").join("");
}

/** Return the transcript as JSON, with the keys of `dsm-jax transcribe`; it has no probabilities of words. */
export function toJson(transcript, { model = null, audio = null } = {}) {
  const rounded = (seconds) => Math.round(seconds * 1000) / 1000;
  const content = {
    audio,
    model,
    duration: rounded(transcript.duration),
    text: transcript.text,
    words: transcript.words.map(({ text, start, end }) => ({ text, start: rounded(start), end: end && rounded(end) })),
    segments: cues(transcript.words).map(({ startMs, endMs, lines }) => ({
      text: lines.join(" "),
      start: startMs / 1000,
      end: endMs / 1000,
    })),
    pauses: transcript.pauses.map((pause) => ({ ...pause, time: rounded(pause.time) })),
  };
  return JSON.stringify(content, null, 2) + "\n";
}

/** Return SubRip subtitles of words. */
export function toSrt(words) {
  return cues(words)
    .map(({ startMs, endMs, lines }, n) => `${n + 1}\n${clock(startMs)} --> ${clock(endMs)}\n${lines.join("\n")}\n`)
    .join("\n");
}

function cues(words) {
  const groups = [];
  for (const word of words) {
    if (!word.text.trim()) continue;
    const whole = { ...word, end: word.end ?? word.start };
    const group = groups.at(-1);
    if (group && !breaks(group, whole)) group.push(whole);
    else groups.push([whole]);
  }
  const starts = [];
  for (const [first] of groups) starts.push(Math.max(starts.length ? starts.at(-1) + 1 : 0, Math.round(first.start * 1000)));
  return groups.map((group, n) => {
    const startMs = starts[n];
    const latest = Math.min(startMs + MAX_CUE_MS, starts[n + 1] ?? Infinity);
    const endMs = Math.min(latest, Math.max(Math.round(group.at(-1).end * 1000), startMs + MIN_CUE_MS));
    return { startMs, endMs, lines: wrapped(group) };
  });
}

function breaks(group, word) {
  const [first, last] = [group[0], group.at(-1)];
  return (
    word.start - last.end > GAP_S ||
    (/[.?!…。？！]["')\]»”’]*\s*$/u.test(last.text) && last.end - first.start >= MIN_SENTENCE_S) ||
    wrapped([...group, word]).length > LINES ||
    word.end - first.start > MAX_CUE_MS / 1000
  );
}

/** Break words into lines; a word that is longer than a line has one to itself. */
function wrapped(group) {
  const lines = [];
  for (const piece of joined(group).split(/\s+/)) {
    const longer = `${lines.at(-1)} ${piece}`;
    if (lines.length && [...longer].length <= LINE) lines[lines.length - 1] = longer;
    else lines.push(piece);
  }
  return lines;
}

function clock(milliseconds) {
  const two = (number) => String(number).padStart(2, "0");
  const seconds = Math.floor(milliseconds / 1000);
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  return `${two(h)}:${two(m)}:${two(s)},${String(milliseconds % 1000).padStart(3, "0")}`;
}
