"""Sounds and images in prompts: reading them, and telling them apart.

A field of a prompt template that is called ``audio`` or ``image`` is not text for a model that has
an encoder for it (:mod:`circuitlens.models.composite`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly

from circuitlens.errors import InputError, first_line
from circuitlens.utils.storage import digest

__all__ = ["MEDIA", "Audio", "digest_of", "load_image", "media_value", "opened"]

# Names of fields that are no texts.
MEDIA = ("audio", "image")
_WAVE = (b"RIFF", b"RIFX", b"RF64")
# Decoders and resampling go a little beyond 1.
_LOUDEST = 2.0


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound with one channel.

    Attributes:
        samples: amplitudes between −1 and 1, ``sample``.
        rate: samples per second (Hz).
    """

    samples: Float[NDArray[Any], " sample"] = field(repr=False)
    rate: int

    def __post_init__(self) -> None:
        try:
            samples, rate = np.asarray(self.samples), float(self.rate)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"A sound is an array of samples and their rate in Hz, but this is a "
                f"{type(self.samples).__name__} with the rate {self.rate!r} ({first_line(error)})."
            ) from error
        if samples.ndim != 1 or not samples.size:
            raise InputError(
                f"A sound is one row of samples, but these have the shape {samples.shape}: give "
                "one channel, samples.mean(axis) of several."
            )
        if samples.dtype.kind != "f":
            raise InputError(
                f"The samples of a sound are floats between -1 and 1, but these are "
                f"{samples.dtype}: divide them by their full scale, samples / 32768."
            )
        if not np.isfinite(samples).all():
            raise InputError("A sound has samples that are NaN or infinite: repair the recording.")
        if np.abs(samples).max() > _LOUDEST:
            raise InputError(
                f"The samples of a sound lie between -1 and 1, but these reach "
                f"{np.abs(samples).max():g}: divide them by their full scale, samples / 32768."
            )
        if not (0 < rate < np.inf and rate.is_integer()):
            raise InputError(f"The rate of a sound is samples per second, not {self.rate!r}.")
        object.__setattr__(self, "samples", samples.astype(np.float32))
        object.__setattr__(self, "rate", int(rate))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Audio) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate

    @property
    def digest(self) -> str:
        """SHA-256, 16 hex digits, of samples and rate."""
        return digest(str(self.rate), self.samples.tobytes())

    def at(self, rate: int) -> Float[NDArray[Any], " sample"]:
        """Samples at another rate (polyphase filtering)."""
        if rate == self.rate:
            return self.samples
        common = gcd(rate, self.rate)
        found = resample_poly(self.samples, rate // common, self.rate // common)
        return np.asarray(found, dtype=np.float32)

    @classmethod
    def load(cls, source: str | Path | bytes) -> Audio:
        """Read a sound file; several channels become their mean.

        WAV files need nothing else, other formats (FLAC, OGG, MP3) the package soundfile.

        Raises:
            InputError: if it cannot be read.
        """
        where = "the bytes of a sound" if isinstance(source, bytes) else str(source)
        try:
            raw = source if isinstance(source, bytes) else Path(source).read_bytes()
        except OSError as error:
            raise InputError(f"The sound {where} could not be read ({error}).") from error
        if not raw.startswith(_WAVE):
            return cls._other_format(raw, where)
        try:
            with warnings.catch_warnings():
                # Chunks of editors' notes, which nobody plays.
                warnings.simplefilter("ignore", wavfile.WavFileWarning)
                rate, samples = wavfile.read(io.BytesIO(raw))
        except Exception as error:  # what a damaged file raises is up to scipy
            raise InputError(
                f"The WAV file {where} could not be read ({first_line(error)}): convert it to "
                "16-bit PCM."
            ) from error
        return cls._named(samples, rate, where)

    @classmethod
    def _named(cls, samples: NDArray[Any], rate: Any, where: str) -> Audio:
        try:
            return cls(_mono(samples), int(rate))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    @classmethod
    def _other_format(cls, raw: bytes, where: str) -> Audio:
        try:
            import soundfile
        except ImportError as error:
            raise InputError(
                f"{where} is not a WAV file, and other formats need the package soundfile: install "
                "it (pip install soundfile), or convert the file to WAV."
            ) from error
        try:
            samples, rate = soundfile.read(io.BytesIO(raw), dtype="float32")
        except Exception as error:
            raise InputError(
                f"The sound {where} could not be read ({first_line(error)})."
            ) from error
        return cls._named(samples, rate, where)


def _mono(samples: NDArray[Any]) -> NDArray[Any]:
    """One channel of floats between −1 and 1."""
    if samples.dtype.kind == "u":
        floats = samples.astype(np.float32) / 128 - 1
    elif samples.dtype.kind == "i":
        floats = samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
    else:
        floats = samples
    return floats if floats.ndim == 1 else floats.mean(1)


def media_value(name: str, value: Any, where: str) -> Any:
    """Return a sound or image as examples hold it.

    Args:
        name: ``"audio"`` or ``"image"``.
        value: a path, or of sounds an :class:`Audio`, ``(samples, rate)``, or a mapping or decoder
            as ``datasets.Audio`` gives them; of images a PIL image, an array or such a mapping.
        where: what to call it in errors.

    Raises:
        InputError: for anything else.
    """
    if isinstance(value, Path):
        return value
    try:
        found = _audio(value) if name == "audio" else _image(value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if found is None:
        what = (
            "a pathlib.Path, circuitlens.Audio(samples, rate), or what datasets.Audio gives"
            if name == "audio"
            else "a pathlib.Path, a PIL image or an array of pixels"
        )
        raise InputError(f"{where} has the {name} {type(value).__name__}: give {what}.")
    return found


def _audio(value: Any) -> Audio | None:
    if isinstance(value, Audio):
        return value
    if isinstance(value, tuple | list) and len(value) == 2:
        return Audio(value[0], value[1])
    if isinstance(value, Mapping):
        if value.get("array") is not None:
            rate: Any = value.get("sampling_rate")
            return Audio(value["array"], rate)
        source = value.get("bytes") or value.get("path")
        return Audio.load(source) if source else None
    if hasattr(value, "get_all_samples"):
        samples = value.get_all_samples()
        return Audio(_mono(np.asarray(samples.data).T), int(samples.sample_rate))
    return None


def _image(value: Any) -> Any:
    if isinstance(value, Mapping):
        source = value.get("bytes") or value.get("path")
        return load_image(source) if source else None
    if isinstance(value, np.ndarray):
        try:
            return _pillow().fromarray(value).convert("RGB")
        except (TypeError, ValueError) as error:
            raise InputError(
                f"An image is an array of bytes, height × width × 3, but this one is "
                f"{value.dtype} with the shape {value.shape}: convert it, such as "
                "(255 * pixels).astype('uint8')."
            ) from error
    # As a file is read: otherwise transparency would make another image of it.
    return value.convert("RGB") if hasattr(value, "convert") else None


def load_image(source: str | Path | bytes) -> Any:
    """Read an image file as a PIL image with three channels.

    Raises:
        InputError: if it cannot be read, or Pillow is not installed.
    """
    try:
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
        with _pillow().open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise InputError(
            f"The image {source!r} could not be read ({first_line(error)})."
        ) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            "Images need the package Pillow: install it (pip install pillow)."
        ) from error
    return Image


def opened(name: str, value: Any) -> Any:
    """A sound or image as the model gets it, read from its file if need be.

    Raises:
        InputError: if its file cannot be read.
    """
    if name == "audio":
        return Audio.load(value) if isinstance(value, Path) else value
    return load_image(value) if isinstance(value, Path) else value.convert("RGB")


def digest_of(name: str, value: Any) -> str:
    """What tells a sound or image apart: what is in it, not its file or format.

    Raises:
        InputError: if its file cannot be read.
    """
    found = opened(name, value)
    if isinstance(found, Audio):
        return found.digest
    return digest(f"{found.size}", found.tobytes())
