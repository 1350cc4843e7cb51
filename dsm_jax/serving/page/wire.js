// The messages of moshi-server's dialect: MessagePack maps with a `type`. Only the kinds of values that these messages
// hold are here: nil, booleans, numbers, strings, binary, arrays and maps with string keys.

const text = new TextEncoder();
const plain = new TextDecoder("utf-8", { fatal: true });

/** Return the bytes of a message of samples, Float32Array, in the layout that the server reads fastest. */
export function encodeAudio(samples) {
  return encode({ type: "Audio", pcm: samples });
}

/** Return the bytes of a value; a Float32Array becomes an array of 32-bit floats. */
export function encode(value) {
  const writer = new Writer();
  writer.value(value);
  return writer.bytes();
}

/** Return the value in the bytes of an ArrayBuffer or Uint8Array; throw an Error if they are not one whole value. */
export function decode(data) {
  const bytes = data instanceof Uint8Array ? data : new Uint8Array(data);
  const reader = new Reader(bytes);
  let value;
  try {
    value = reader.value();
  } catch (error) {
    if (error instanceof RangeError) throw new Error(`the message of ${bytes.length} bytes is cut short`);
    throw error;
  }
  if (reader.at !== bytes.length) throw new Error(`${bytes.length - reader.at} bytes follow the message`);
  return value;
}

class Writer {
  #view = new DataView(new ArrayBuffer(256));
  #at = 0;

  bytes() {
    return new Uint8Array(this.#view.buffer, 0, this.#at);
  }

  /** Make room for so many bytes and return the place of the first. */
  #room(count) {
    const at = this.#at;
    this.#at += count;
    if (this.#at > this.#view.byteLength) {
      const larger = new Uint8Array(Math.max(2 * this.#view.byteLength, this.#at));
      larger.set(new Uint8Array(this.#view.buffer, 0, at));
      this.#view = new DataView(larger.buffer);
    }
    return at;
  }

  #byte(value) {
    const at = this.#room(1); // before the view is read: making room may replace it
    this.#view.setUint8(at, value);
  }

  /** Write a tag and a big-endian number of 1, 2, 4 or 8 bytes. */
  #tagged(tag, setter, size, number) {
    this.#byte(tag);
    const at = this.#room(size);
    this.#view[setter](at, number);
  }

  value(value) {
    if (value === null) this.#byte(0xc0);
    else if (typeof value === "boolean") this.#byte(value ? 0xc3 : 0xc2);
    else if (typeof value === "number") this.#number(value);
    else if (typeof value === "string") this.#string(value);
    else if (value instanceof Float32Array) this.#floats(value);
    else if (value instanceof Uint8Array) this.#raw([null, 0xc4, 0xc5, 0xc6], 0, value);
    else if (Array.isArray(value)) {
      this.#head(0x90, 0xdc, value.length);
      for (const item of value) this.value(item);
    } else if (typeof value === "object") {
      const entries = Object.entries(value);
      this.#head(0x80, 0xde, entries.length);
      for (const [key, item] of entries) {
        this.#string(key);
        this.value(item);
      }
    } else throw new Error(`a value of type ${typeof value} cannot be sent`);
  }

  #number(value) {
    if (!Number.isSafeInteger(value) || Object.is(value, -0)) this.#tagged(0xcb, "setFloat64", 8, value);
    else if (value >= 0) {
      if (value < 0x80) this.#byte(value);
      else if (value < 0x100) this.#tagged(0xcc, "setUint8", 1, value);
      else if (value < 0x10000) this.#tagged(0xcd, "setUint16", 2, value);
      else if (value < 0x100000000) this.#tagged(0xce, "setUint32", 4, value);
      else this.#tagged(0xcf, "setBigUint64", 8, BigInt(value));
    } else if (value >= -0x20) this.#byte(0x100 + value);
    else if (value >= -0x80) this.#tagged(0xd0, "setInt8", 1, value);
    else if (value >= -0x8000) this.#tagged(0xd1, "setInt16", 2, value);
    else if (value >= -0x80000000) this.#tagged(0xd2, "setInt32", 4, value);
    else this.#tagged(0xd3, "setBigInt64", 8, BigInt(value));
  }

  #string(value) {
    this.#raw([0xa0, 0xd9, 0xda, 0xdb], 0x20, text.encode(value));
  }

  #raw([short, tag8, tag16, tag32], most, bytes) {
    const size = bytes.length;
    if (size < most) this.#byte(short | size);
    else if (size < 0x100) this.#tagged(tag8, "setUint8", 1, size);
    else if (size < 0x10000) this.#tagged(tag16, "setUint16", 2, size);
    else this.#tagged(tag32, "setUint32", 4, size);
    const at = this.#room(size);
    new Uint8Array(this.#view.buffer).set(bytes, at);
  }

  /** Write the head of an array or a map. */
  #head(short, tag16, count) {
    if (count < 16) this.#byte(short | count);
    else if (count < 0x10000) this.#tagged(tag16, "setUint16", 2, count);
    else this.#tagged(tag16 + 1, "setUint32", 4, count);
  }

  #floats(values) {
    this.#head(0x90, 0xdc, values.length);
    let at = this.#room(5 * values.length);
    for (const value of values) {
      this.#view.setUint8(at, 0xca);
      this.#view.setFloat32(at + 1, value);
      at += 5;
    }
  }
}

class Reader {
  #bytes;
  #view;

  constructor(bytes) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.at = 0;
  }

  #number(getter, size) {
    const value = this.#view[getter](this.at);
    this.at += size;
    return value;
  }

  #raw(size) {
    if (this.at + size > this.#bytes.length) throw new RangeError("end");
    this.at += size;
    return this.#bytes.subarray(this.at - size, this.at);
  }

  #string(size) {
    return plain.decode(this.#raw(size));
  }

  #array(count) {
    const items = [];
    for (let n = 0; n < count; n++) items.push(this.value());
    return items;
  }

  #map(count) {
    const entries = [];
    for (let n = 0; n < count; n++) entries.push([this.value(), this.value()]);
    return Object.fromEntries(entries);
  }

  value() {
    const tag = this.#number("getUint8", 1);
    if (tag < 0x80) return tag;
    if (tag < 0x90) return this.#map(tag & 0x0f);
    if (tag < 0xa0) return this.#array(tag & 0x0f);
    if (tag < 0xc0) return this.#string(tag & 0x1f);
    if (tag >= 0xe0) return tag - 0x100;
    switch (tag) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: return this.#raw(this.#number("getUint8", 1));
      case 0xc5: return this.#raw(this.#number("getUint16", 2));
      case 0xc6: return this.#raw(this.#number("getUint32", 4));
      case 0xca: return this.#number("getFloat32", 4);
      case 0xcb: return this.#number("getFloat64", 8);
      case 0xcc: return this.#number("getUint8", 1);
      case 0xcd: return this.#number("getUint16", 2);
      case 0xce: return this.#number("getUint32", 4);
      case 0xcf: return Number(this.#number("getBigUint64", 8));
      case 0xd0: return this.#number("getInt8", 1);
      case 0xd1: return this.#number("getInt16", 2);
      case 0xd2: return this.#number("getInt32", 4);
      case 0xd3: return Number(this.#number("getBigInt64", 8));
      case 0xd9: return this.#string(this.#number("getUint8", 1));
      case 0xda: return this.#string(this.#number("getUint16", 2));
      case 0xdb: return this.#string(this.#number("getUint32", 4));
      case 0xdc: return this.#array(this.#number("getUint16", 2));
      case 0xdd: return this.#array(this.#number("getUint32", 4));
      case 0xde: return this.#map(this.#number("getUint16", 2));
      case 0xdf: return this.#map(this.#number("getUint32", 4));
    }
    throw new Error(`the message holds a value of kind 0x${tag.toString(16)}, which no message has`);
  }
}
