"""Damaged files of every kind that is read: python -m tests.fuzz --cases=2000 --seed=1

A case is a small folder of sound files of which one is damaged, and is then read as the commands
read it. It passes where the file is read to the same values, refused in one line, made anew or
passed over. It fails on a traceback, on a hang, where memory grows beyond a bound, where files are
left that nobody asked for, and, for kinds that can tell (`Kind.told`), where other values come out.
`--kind=NAME` takes one kind alone, `--case=N` one case, which fails with its traceback.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

from mdt_jax import cli
from mdt_jax.runtime.errors import UserError
from tests.fuzz_kinds import KINDS, FellBack, Kind

SECONDS = 10  # in which a case must have ended
MEMORY = 600  # MiB by which a case may raise the process's peak
HUGE = (
    "-1", "0", "1", "4294967296", "1" + "0" * 30, "9" * 5000, "1e999", "-1e999", "NaN", "Infinity",
)  # fmt: skip
ODD = (
    None, True, [], {}, [[]], "", "x" * 5000, "\ud800", "\x1b[31m", "a\nb", -1, 0, 2**31, 2**63,
    10**400, 1e308, float("nan"), float("inf"), "../../x", "/etc/passwd", {"a": {"b": 1}},
)  # fmt: skip


class Hang(BaseException):
    """A case took too long; no `except Exception` catches it."""


class Outcome(NamedTuple):
    """how: same, other, refused, fell back, or what a case failed on; said: what was printed."""

    how: str
    said: str = ""

    @property
    def failed(self) -> bool:
        return self.how not in ("same", "other", "refused", "fell back")


def flipped_bits(content: bytes, draw: random.Random) -> bytes:
    """A few bits flipped, in half of the cases near the beginning or the end."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[_place(content, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def other_bytes(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    start = _place(content, draw)
    for at in range(start, min(start + draw.choice((1, 4, 16)), len(changed))):
        changed[at] = draw.randrange(256)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return draw.choice((content[:at], content[at:], content[:-1]))


def doubled(content: bytes, draw: random.Random) -> bytes:
    return content * draw.choice((2, 3))


def zeros(content: bytes, draw: random.Random) -> bytes:
    start, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:start] + draw.choice((b"\0", b"\xff")) * (end - start) + content[end:]


def swapped(content: bytes, draw: random.Random) -> bytes:
    a, b, c = sorted(draw.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def inserted(content: bytes, draw: random.Random) -> bytes:
    at = _place(content, draw)
    return content[:at] + draw.randbytes(draw.choice((1, 8, 512))) + content[at:]


def left_out(content: bytes, draw: random.Random) -> bytes:
    at = _place(content, draw)
    return content[:at] + content[at + draw.choice((1, 8, 64, 512)) :]


def empty(content: bytes, draw: random.Random) -> bytes:
    return b""


def nested(content: bytes, draw: random.Random) -> bytes:
    depth = draw.choice((100, 2000, 100_000))
    return draw.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))


def absurd_number(content: bytes, draw: random.Random) -> bytes:
    """Digits, or bytes that may be a number, become one that nobody can mean."""
    numbers = list(re.finditer(rb"[0-9]+(?:\.[0-9]+)?", content[: 1 << 16]))
    if numbers and draw.random() < 0.6:
        found = draw.choice(numbers)
        wide = draw.choice(HUGE).encode()
        if draw.random() < 0.5:  # of the same length, so that what follows lies where it lay
            wide = (draw.choice(b"79-").to_bytes() * 40)[: found.end() - found.start()]
        return content[: found.start()] + wide + content[found.end() :]
    at = _place(content, draw)
    order = draw.choice("<>")
    value = draw.choice((
        struct.pack(order + "I", draw.choice((2**32 - 1, 2**31 - 1, 2**31, 2**24, 1 << 16))),
        struct.pack(order + "Q", draw.choice((2**64 - 1, 2**63 - 1, 2**40, 2**33))),
    ))  # fmt: skip
    return content[:at] + value + content[at + len(value) :]


def odd_json(content: bytes, draw: random.Random) -> bytes:
    """Sound JSON in which one value is of another kind, is gone, or has another name."""
    lines = content.splitlines() if b"\n{" in content.strip() else [content]
    number = draw.randrange(len(lines)) if lines else 0
    try:
        tree = json.loads(lines[number])
    except (ValueError, IndexError):
        return nested(content, draw)
    places = list(_inside(tree))
    if not places or draw.random() < 0.1:
        tree = draw.choice(ODD)
    else:
        holder, key = draw.choice(places)
        if draw.random() < 0.2 and isinstance(holder, dict):
            holder["other"] = holder.pop(key)
        elif draw.random() < 0.2:
            del holder[key]
        else:
            holder[key] = draw.choice(ODD)
    lines[number] = json.dumps(tree).encode()
    return b"\n".join(lines) + b"\n" * (len(lines) > 1 or content.endswith(b"\n"))


def sound_around(content: bytes, draw: random.Random) -> bytes:
    """Damage inside a zip or a PNG whose checksums are those of what was damaged."""
    if content.startswith(b"\x89PNG") and len(content) > 33:
        header = bytearray(content[12:29])
        at = draw.choice((4, 8, 12, 13))
        header[at : at + 4] = struct.pack(">I", draw.choice((0, 1, 2**16, 2**24, 2**31 - 1)))
        header = bytes(header[:17])
        return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    if content[257:262] == b"ustar":
        return _header_of_a_tar(content, draw)
    if content[8:10] == b'{"' and not zipfile.is_zipfile(io.BytesIO(content)):
        length = struct.unpack("<Q", content[:8])[0]
        header = odd_json(content[8 : 8 + length], draw)
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return flipped_bits(content, draw)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    chosen = draw.choice(list(parts))
    damage = draw.choice((flipped_bits, other_bytes, cut, absurd_number, inserted, empty, zeros))
    parts[chosen] = damage(parts[chosen], draw) if parts[chosen] else b"x"
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as out:
        for name, part in parts.items():
            out.writestr(name, part)
    return made.getvalue()


def _header_of_a_tar(content: bytes, draw: random.Random) -> bytes:
    """One header is of another length, kind or name, and its checksum is right."""
    starts = [n for n in range(0, len(content), 512) if content[n + 257 : n + 262] == b"ustar"]
    start = draw.choice(starts)
    header = bytearray(content[start : start + 512])
    if (what := draw.random()) < 0.4:
        sizes = (b"7" * 11, b"0" * 11, b"-0000000512", b"\x80" + b"\0" * 6 + b"\x7f\0\0\0",
                 b"\xff" * 11, b"00000001000", b"9" * 11)  # fmt: skip
        header[124:135] = draw.choice(sizes)
    elif what < 0.7:
        header[156] = draw.choice(b"01256KLSxg\0")
    else:
        header[draw.randrange(100)] = draw.randrange(256)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:start] + bytes(header) + content[start + 512 :]


# Of these a checksum over the file can know nothing: what is in it was written anew.
REWRITTEN = (odd_json, sound_around)
DAMAGES = (
    flipped_bits, other_bytes, cut, doubled, zeros, swapped, inserted, left_out, empty, nested,
    absurd_number, odd_json, sound_around,
)  # fmt: skip


def _place(content: bytes, draw: random.Random) -> int:
    if draw.random() < 0.5:
        return draw.randrange(len(content))
    near = draw.randrange(min(len(content), 256))
    return near if draw.random() < 0.6 else len(content) - 1 - near


def _inside(tree) -> Iterator[tuple]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _inside(value)


def a_folder(path: pathlib.Path) -> None:
    path.mkdir()


def a_pipe(path: pathlib.Path) -> None:
    os.mkfifo(path)


def a_loop(path: pathlib.Path) -> None:
    path.symlink_to(path.name)


def a_dangling_link(path: pathlib.Path) -> None:
    path.symlink_to("nothing")


def nothing(path: pathlib.Path) -> None:
    """It is gone."""


PLACES = (a_folder, a_pipe, a_loop, a_dangling_link, nothing)


class Bench:
    """Sound folders of each kind, made once, and what is read of them."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._sound: dict[str, str] = {}

    def sound(self, kind: Kind) -> pathlib.Path:
        place = self.folder / "sound" / kind.name.replace(" ", "-")
        if kind.name not in self._sound:
            place.mkdir(parents=True)
            kind.make(place)
            copy = self._copied(place)
            with _quiet():
                self._sound[kind.name] = _digest(kind.read(copy))
        return place

    def _copied(self, place: pathlib.Path) -> pathlib.Path:
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(place, case)  # with the times of the files
        return case

    def files(self, kind: Kind) -> list[str]:
        """Those of a kind's files that are damaged."""
        place = self.sound(kind)
        found = (path for path in place.rglob("*") if path.is_file() and kind.damages(path))
        return sorted(path.relative_to(place).as_posix() for path in found)

    def run(self, kind: Kind, draw: random.Random, show: bool = False) -> tuple[str, Outcome]:
        """(what was damaged and how, what came of it) of one case."""
        name = draw.choice(self.files(kind))
        damage = draw.choice(PLACES if draw.random() < 0.12 else DAMAGES)
        return self.case(kind, name, damage, draw, show)

    def case(
        self, kind: Kind, name: str, damage: Callable, draw: random.Random, show: bool = False
    ) -> tuple[str, Outcome]:
        """As `run`, of one file and one damage. show: what is raised is not caught."""
        case = self._copied(self.sound(kind))
        target = case / name
        before = os.stat(target)
        if damage in PLACES:
            target.unlink()
            damage(target)
        else:
            content = target.read_bytes()
            if draw.random() < 0.03:
                other = draw.choice([p for p in self.folder.glob("sound/**/*") if p.is_file()])
                content = other.read_bytes()
            elif content:
                content = damage(content, draw)
            target.write_bytes(content)
            os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
        title = f"{kind.name}: {name}: {damage.__name__}"
        there = _names(case)
        outcome = self._read(kind, case, show)
        made = [n for n in _names(case) - there if not kind.makes(n) or n.endswith(".tmp")]
        if made and not outcome.failed:
            return title, Outcome(f"LEFT {made[0]}", outcome.said)
        if outcome.how == "other" and kind.told and damage not in REWRITTEN:
            return title, Outcome("OTHER VALUES in silence", outcome.said)
        return title, outcome

    def _read(self, kind: Kind, case: pathlib.Path, show: bool) -> Outcome:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with _quiet() as printed:
            try:
                with _limited(), mock.patch.object(os, "fsync"):  # no power is cut here
                    how = "same" if _digest(kind.read(case)) == self._sound[kind.name] else "other"
            except FellBack:
                how = "fell back"
            except (UserError, OSError) as error:  # the commands print it as one line
                how, line = "refused", cli.one_line(error)
                if str(case) not in line:
                    how = f"MESSAGE names no file: {line[:200]}"
                printed.write(line)
            except Hang:
                how = f"HANG of more than {SECONDS} s"
            except Exception as error:
                if show:
                    raise
                where = traceback.extract_tb(error.__traceback__)
                ours = [f"{f.filename.split('mdt_jax/')[-1]}:{f.lineno}" for f in where
                        if "/mdt_jax/" in f.filename]  # fmt: skip
                how = f"TRACEBACK {type(error).__name__} at {ours[-1:]}: {str(error)[:100]}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        if grown > MEMORY << 10:
            how = f"MEMORY grew by {grown >> 10} MiB ({how})"
        return Outcome(how, printed.getvalue())


def _names(folder: pathlib.Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _digest(value) -> str:
    return hashlib.sha256(repr(value).encode(errors="replace")).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield printed


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def give_up(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again where a `finally` waits, too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def cases(seed: int, count: int, kinds: list[Kind]) -> Iterator[tuple[int, Kind, random.Random]]:
    """`count` cases, the kinds in turn; case n is the same however many there are."""
    for number, kind in zip(range(count), itertools.cycle(kinds), strict=False):
        yield number, kind, random.Random(f"{seed} {number} {kind.name}")


def run(
    folder: pathlib.Path, seed: int, count: int, names: str = "", only: int | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> tuple[dict[str, collections.Counter], list[str]]:  # fmt: skip
    """(outcomes by kind, what failed) of `count` cases."""
    kinds = [kind for kind in KINDS if names in kind.name]
    bench, table, failed = Bench(folder), collections.defaultdict(collections.Counter), []
    for number, kind, draw in cases(seed, count, kinds):
        if only is not None and number != only:
            continue
        title, outcome = bench.run(kind, draw, only is not None)
        table[kind.name]["failed" if outcome.failed else outcome.how] += 1
        if outcome.failed:
            failed.append(f"case {number}, {title}: {outcome.how}")
            tell(failed[-1])
        elif only is not None:
            tell(f"{title}: {outcome.how}\n{outcome.said}")
    return table, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", default="", help="those with this in their names")
    parser.add_argument("--case", type=int, help="this one alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table, failed = run(
            pathlib.Path(folder), args.seed, args.cases, args.kind, args.case,
            lambda line: print(line, flush=True),
        )  # fmt: skip
    columns = ("same", "other", "refused", "fell back", "failed")
    print(f"{'':24}" + "".join(f"{name:>11}" for name in columns))
    for name, counts in table.items():
        print(f"{name:24}" + "".join(f"{counts[column]:11}" for column in columns))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
