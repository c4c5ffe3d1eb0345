"""What pages of Markdown tell their readers to type, and what they name."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
QUOTE = re.compile(r"`([^`\n]+)`")
# A quote that begins so, and goes on, is a command.
PROGRAMS = ("blip2 ", "python ", "pytest ", "pip ", "./launch/")
# Left to the reader: [optional parts], ..., {one,of,these}, and nothing behind an equals sign.
OPEN = re.compile(r"\[--|\.\.\.|\{\w+,|=$")


@dataclass(frozen=True)
class Pages:
    """Pages of Markdown, read as one.

    Attributes:
      paths: of the files, in their order.
    """

    paths: tuple[Path, ...]

    @cached_property
    def text(self) -> str:
        return "\n".join(path.read_text(encoding="utf-8") for path in self.paths)

    def blocks(self, language: str) -> list[str]:
        """The fenced blocks of a language ("" for those without one), in order."""
        return [code for name, code in FENCE.findall(self.text) if name == language]

    @cached_property
    def quotes(self) -> list[str]:
        """All code within lines of text and cells of tables, without the fenced blocks."""
        prose = FENCE.sub("", self.text)
        return [quote.replace(r"\|", "|") for quote in QUOTE.findall(prose)]

    @cached_property
    def _lines(self) -> list[tuple[str, str]]:
        return [line for block in self.blocks("bash") for line in lines_of(block)]

    @cached_property
    def commands(self) -> list[str]:
        """What readers may type as it stands, in order, each once, in blocks and in text."""
        whole = [quote for quote in self._quoted if not OPEN.search(quote)]
        # One order for both kinds: that of the page.
        found = [command for command, _ in self._lines] + whole
        return sorted(dict.fromkeys(found), key=self._place)

    @cached_property
    def _quoted(self) -> list[str]:
        """Quotes that begin as commands do; `blip2 train` alone is a name, not a command."""
        quoted = [quote for quote in self.quotes if quote.startswith(PROGRAMS)]
        return [quote for quote in quoted if not re.fullmatch(r"blip2 \w+", quote)]

    def _place(self, command: str) -> int:
        words = r"[\s\\]+".join(map(re.escape, command.split()))
        return re.search(words, self.text).start()

    @cached_property
    def forms(self) -> list[str]:
        """Quoted commands of which something is left to the reader, brackets taken away."""
        return [re.sub(r"[\[\]]", "", quote) for quote in self._quoted if OPEN.search(quote)]

    @cached_property
    def hints(self) -> list[tuple[str, str]]:
        """(command, comment behind it) of the lines of bash blocks that have one."""
        return [(command, comment) for command, comment in self._lines if comment]

    @cached_property
    def links(self) -> list[tuple[Path, str]]:
        """(page, target) of links and pictures, without those to the web."""
        target = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')
        found = []
        for path in self.paths:
            prose = FENCE.sub("", path.read_text(encoding="utf-8"))
            found += [(path, link or picture) for link, picture in target.findall(prose)]
        return [(path, target) for path, target in found if "://" not in target]

    @cached_property
    def recipes(self) -> list[str]:
        """Every `configs/FILE.py:ARG`, `FILE.py:ARG`, `FILE.py[:A|B]` and `--config=NAME`."""
        quoted = [*self.quotes, *(command for command, _ in self._lines)]
        found = [name for text in quoted for name in re.findall(r"--config=([a-z][\w/:.-]+)", text)]
        found += [quote for quote in self.quotes if re.fullmatch(r"eval/\w+:[\w.-]+", quote)]
        for quote in quoted:
            for file, either, arg in re.findall(
                r"([\w/]+\.py)(?:\[:([\w.|-]+)\]|:([\w.-]+))?", quote
            ):
                if file.startswith("configs/") or arg or either:
                    file = file if "/" in file else f"configs/{file}"
                    args = either.split("|") if either else [arg]
                    found += [f"{file}:{a}" if a else file for a in args]
        return list(dict.fromkeys(found))

    @cached_property
    def metrics(self) -> list[str]:
        """Quotes that are names of what stage 1 logs: `itm/accuracy`."""
        names = (quote for quote in self.quotes if re.fullmatch(r"it[cmg]/\w+", quote))
        return list(dict.fromkeys(names))

    @cached_property
    def files(self) -> list[str]:
        """Quotes that are paths of files or folders: a slash in them, or at their end."""
        path = re.compile(r"\.?[\w.-]+(/[\w.-]+)*/[\w.-]*")
        paths = dict.fromkeys(quote for quote in self.quotes if path.fullmatch(quote))
        return [path for path in paths if path not in self.metrics]


def lines_of(block: str) -> list[tuple[str, str]]:
    """(command, comment) of each line of a bash block, continued lines joined, spaces made one."""
    found = []
    for line in re.sub(r"\\\n", " ", block).splitlines():
        command, comment = split_comment(line)
        if command.strip():
            found.append((" ".join(command.split()), comment))
    return found


def split_comment(line: str) -> tuple[str, str]:
    """A line of shell without its comment, and the comment: what follows a # outside quotes."""
    quote = ""
    for at, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (at == 0 or line[at - 1].isspace()):
            return line[:at], line[at + 1 :].strip()
    return line, ""


def anchors_of(page: Path) -> set[str]:
    """What a link may have behind its #: the page's headings, as GitHub and the site name them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


README = Pages((ROOT / "README.md",))
# In the order in which the README lists them.
DOCS = Pages(
    tuple(ROOT / name for name in re.findall(r"^\| \[(docs/\w+\.md)\]", README.text, re.M))
)
GUIDES = Pages(README.paths + DOCS.paths)
