"""moshi-server's messages: outgoing ones to the byte, incoming ones as its own reader takes and refuses them."""

import math
import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsm_jax.errors import WireError
from dsm_jax.serving.moshi import wire
from dsm_jax.serving.moshi.wire import TO_SPEAK, TO_TRANSCRIBE, decode, encode

PCM = np.linspace(-1, 1, 1920, dtype=np.float32)


def f32(value: float) -> str:
    return "ca" + struct.pack(">f", value).hex()


def f64(value: float) -> str:
    return "cb" + struct.pack(">d", value).hex()


def text(value: str) -> str:
    return f"{0xA0 | len(value):x}" + value.encode().hex()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (wire.Ready(), "81" + text("type") + text("Ready")),
        (
            wire.Word("one", 1.5),
            "83" + text("type") + text("Word") + text("text") + text("one") + text("start_time") + f64(1.5),
        ),
        (wire.EndWord(2.0), "82" + text("type") + text("EndWord") + text("stop_time") + f64(2.0)),
        (wire.Marker(5), "82" + text("type") + text("Marker") + text("id") + "05"),
        (wire.Marker(-1), "82" + text("type") + text("Marker") + text("id") + "ff"),
        (wire.Marker(2**40), "82" + text("type") + text("Marker") + text("id") + "cf" + "0000010000000000"),
        (
            wire.Step(300, [0.25, 0.5], 1919),
            "84" + text("type") + text("Step") + text("step_idx") + "cd012c"
            + text("prs") + "92" + f32(0.25) + f32(0.5) + text("buffered_pcm") + "cd077f",
        ),
        (wire.Error("full"), "82" + text("type") + text("Error") + text("message") + text("full")),
        (
            wire.Text("hi", 0.0, 0.5),
            "84" + text("type") + text("Text") + text("text") + text("hi")
            + text("start_s") + f64(0.0) + text("stop_s") + f64(0.5),
        ),
        (wire.Audio(np.float32([0.5])), "82" + text("type") + text("Audio") + text("pcm") + "91" + f32(0.5)),
        (wire.OggOpus(b"\x01\xc8"), "82" + text("type") + text("OggOpus") + text("data") + "92" + "01" + "ccc8"),
    ],
)  # fmt: skip
def test_outgoing_messages_are_serdes_bytes(message, expected):
    assert encode(message).hex() == expected


@pytest.mark.parametrize("count", [0, 15, 16, 1920, 65_535, 65_536])
def test_lists_of_samples_have_msgpacks_lengths(count):
    pcm_T = np.arange(count, dtype=np.float32)
    assert wire.floats(pcm_T) == msgpack.packb(pcm_T.tolist(), use_single_float=True)
    np.testing.assert_array_equal(msgpack.unpackb(encode(wire.Audio(pcm_T)))["pcm"], pcm_T)


def audio(pcm, **more) -> bytes:
    return msgpack.packb({"type": "Audio", "pcm": pcm, **more})


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb({"type": "Audio", "pcm": PCM.tolist()}, use_single_float=True),
        audio(PCM.tolist()),
        audio(PCM.tolist(), sample_rate=24_000),
        audio(PCM.tobytes()),
        msgpack.packb({"pcm": PCM.tolist(), "type": "Audio"}),
        msgpack.packb({"pcm": PCM.tolist(), "type": b"Audio"}),
        msgpack.packb(["Audio", PCM.tolist()]),
        audio(PCM.tolist()) + b"and anything after it",
        msgpack.packb({"type": "Audio", "pcm": PCM.tolist()}, use_single_float=True) + b"\0",
    ],
)
def test_samples_are_read_in_every_layout(data):
    found = decode(data, TO_TRANSCRIBE)
    assert isinstance(found, wire.Audio)
    assert found.pcm.dtype == np.float32
    np.testing.assert_array_equal(found.pcm, PCM)


def test_the_quick_reader_reads_what_the_general_one_reads():
    data = bytearray(msgpack.packb({"type": "Audio", "pcm": PCM.tolist()}, use_single_float=True))
    assert wire.plain_audio(bytes(data)) is not None
    mixed = msgpack.packb({"type": "Audio", "pcm": [*PCM[:-1].tolist(), 1]}, use_single_float=True)
    assert wire.plain_audio(mixed) is None  # an integer among the numbers
    np.testing.assert_array_equal(decode(mixed, TO_TRANSCRIBE).pcm[:-1], PCM[:-1])
    assert wire.plain_audio(bytes(data[:-1])) is None
    np.testing.assert_array_equal(decode(audio([0, 1, -1, 0.5]), TO_TRANSCRIBE).pcm, [0, 1, -1, 0.5])
    assert decode(audio([]), TO_TRANSCRIBE).pcm.size == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"type": "Init"}, wire.Init()),
        ({"type": "Marker", "id": 5}, wire.Marker(5)),
        ({"type": "Marker", "id": -(2**63)}, wire.Marker(-(2**63))),
        ({"type": "Marker", "id": 5, "flush": True}, wire.Marker(5, flush=True)),
        ({"type": "Marker", "id": 5, "flush": 1}, wire.Marker(5)),
        (["Marker", 5], wire.Marker(5)),
        ({"type": "OggOpus", "data": [1, 200]}, wire.OggOpus(b"\x01\xc8")),
        ({"type": "OggOpus", "data": b"\x01\xc8"}, wire.OggOpus(b"\x01\xc8")),
        ({"type": "Text", "text": "hi"}, wire.Text("hi")),
        ({"type": "Eos"}, wire.Eos()),
        (["Eos"], wire.Eos()),
    ],
)
def test_other_messages_are_read(values, expected):
    assert decode(msgpack.packb(values), (*TO_TRANSCRIBE, *TO_SPEAK)) == expected


def test_a_voice_has_its_shape():
    found = decode(msgpack.packb({"type": "Voice", "embeddings": [1.0] * 6, "shape": [1, 2, 3]}), TO_SPEAK)
    assert isinstance(found, wire.Voice)
    assert found.embeddings.shape == found.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("Audio", r"^the message is a string; expected a map with a type$"),
        ([], r"^the message is a list; expected a map with a type$"),
        ({"pcm": [0.0]}, r"^the type is nil; expected a string such as 'Audio'$"),
        ({"type": "Sound"}, r"^the type is 'Sound'; expected one of Init, Audio, OggOpus, Marker$"),
        ({"type": "Eos"}, r"^the type is 'Eos'; expected one of Init, Audio, OggOpus, Marker$"),
        ({"type": "x" * 50}, r"^the type is 'x{40}'; expected one of"),
        ({"type": b"\xff"}, r"^the type is '\ufffd'; expected one of"),
        ({"type": "Audio"}, r"^Audio lacks pcm; send it$"),
        ({"type": "Audio", "pcm": "abc"}, r"^pcm is a string; expected a list of numbers$"),
        ({"type": "Audio", "pcm": b"abc"}, r"^pcm has 3 bytes; float32 in binary has a multiple of 4$"),
        ({"type": "Audio", "pcm": [0.0, True]}, r"^pcm holds a value of type bool; expected numbers alone$"),
        ({"type": "Audio", "pcm": [0.0, None]}, r"^pcm holds nil; expected numbers alone$"),
        ({"type": "Audio", "pcm": [math.nan]}, r"^pcm holds NaN or infinity; send finite numbers$"),
        ({"type": "Audio", "pcm": [1e300]}, r"^pcm holds NaN or infinity; send finite numbers$"),
        ({"type": "OggOpus", "data": [256]}, r"^data is a list; expected a list of numbers from 0 to 255, or binary$"),
        ({"type": "OggOpus", "data": [0.5]}, r"^data is a list; expected a list of numbers from 0 to 255, or binary$"),
        ({"type": "OggOpus", "data": "abc"}, r"^data is a string; expected a list of numbers"),
        ({"type": "Marker"}, r"^Marker lacks id; send it$"),
        (
            {"type": "Marker", "id": 2**63},
            r"^the id of the marker is a value of type int; expected an integer of 64 bits$",
        ),
        (
            {"type": "Marker", "id": 1.0},
            r"^the id of the marker is a value of type float; expected an integer of 64 bits$",
        ),
        ({"type": "Marker", "id": "1"}, r"^the id of the marker is a string; expected an integer of 64 bits$"),
        ({"type": "Marker", "id": None}, r"^the id of the marker is nil; expected an integer of 64 bits$"),
        (
            {"type": "Marker", "id": True},
            r"^the id of the marker is a value of type bool; expected an integer of 64 bits$",
        ),
        (["Marker"], r"^Marker lacks id; send it$"),
    ],
)
def test_what_is_no_message_is_refused(values, message):
    with pytest.raises(WireError, match=message):
        decode(msgpack.packb(values), TO_TRANSCRIBE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "Text", "text": b"abc"}, r"^the text is binary; expected a string$"),
        (
            {"type": "Voice", "embeddings": [1.0], "shape": [2]},
            r"^the voice has 1 numbers; its shape \[2\] is one of 2$",
        ),
        (
            {"type": "Voice", "embeddings": [], "shape": [0]},
            r"^the shape of the voice is \[0\]; expected 1 to 3 numbers$",
        ),
        ({"type": "Voice", "embeddings": [1.0], "shape": []}, r"^the shape of the voice is \[\]; expected 1 to 3"),
        ({"type": "Voice", "embeddings": [1.0], "shape": [True]}, r"^the shape of the voice is \[True\]; expected 1"),
        (
            {"type": "Voice", "embeddings": [], "shape": [2**32, 2**32]},
            r"^the voice has 0 numbers; its shape \[4294967296, 4294967296\] is one of 18446744073709551616$",
        ),
        (
            {"type": "Voice", "embeddings": [1.0], "shape": [1] * 4},
            r"^the shape of the voice is \[1, 1, 1, 1\]; expected",
        ),
        ({"type": "Voice", "embeddings": [math.inf], "shape": [1]}, r"^embeddings holds NaN or infinity"),
    ],
)
def test_what_cannot_be_spoken_is_refused(values, message):
    with pytest.raises(WireError, match=message):
        decode(msgpack.packb(values), TO_SPEAK)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x82\xa4type", b"\xc1", msgpack.packb({"type": "Audio", "pcm": [0.5]})[:-1], b"\x91" * 100_000],
    ids=["empty", "no value", "no type of MessagePack", "cut short", "deep"],
)
def test_bytes_that_are_no_messagepack_are_refused(data):
    with pytest.raises(WireError, match=r"^the message is not MessagePack \(\w+\); send a map with a type$"):
        decode(data, TO_TRANSCRIBE)


def test_samples_of_the_quick_reader_are_checked_too():
    samples = [*PCM[:-1].tolist(), math.nan]
    data = msgpack.packb({"type": "Audio", "pcm": samples}, use_single_float=True)
    assert wire.plain_audio(data) is not None
    with pytest.raises(WireError, match=r"^pcm holds NaN or infinity; send finite numbers$"):
        decode(data, TO_TRANSCRIBE)
    with pytest.raises(WireError, match=r"^the type is 'Audio'; expected one of Text, Voice, Eos$"):
        decode(data, TO_SPEAK)


VALID = [
    encode(wire.Audio(PCM[:40])),
    msgpack.packb({"type": "Audio", "pcm": PCM[:40].tolist()}),
    msgpack.packb({"type": "OggOpus", "data": [1, 200]}),
    msgpack.packb({"type": "Marker", "id": 5}),
    msgpack.packb({"type": "Text", "text": "seven four"}),
    msgpack.packb({"type": "Voice", "embeddings": [1.0] * 6, "shape": [2, 3]}),
]


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=4), st.data())
def test_any_bytes_are_a_message_or_are_refused(valid, changes, data):
    mutated = bytearray(valid)
    for place, value in changes:
        mutated[place % len(mutated)] = value
    cut = data.draw(st.integers(0, len(mutated)))
    for sent in (bytes(mutated), bytes(mutated[:cut]), bytes(mutated) * 2):
        try:
            found = decode(sent, (*TO_TRANSCRIBE, *TO_SPEAK))
        except WireError:
            continue
        assert isinstance(found, wire.Incoming)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_are_refused(sent):
    try:
        found = decode(sent, TO_TRANSCRIBE)
    except WireError:
        return
    assert isinstance(found, wire.Incoming)
