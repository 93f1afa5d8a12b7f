"""The documentation site: nbdev processes the notebooks, Zensical renders them. `docs.py FOLDER` puts it there.

A page shows what its room offers, examples and results; the code of the room is folded below what it defines."""
import html
import inspect
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastcore import docments
from nbconvert import MarkdownExporter
from nbdev import processors
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from nbformat import NO_CONVERT, read
from nbformat.v4 import new_markdown_cell
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
SOURCE = f"{get_config().git_url}/blob/{get_config().branch}"
FIRST = ["first_release", "my_own_model", "which_model", "text_of_any_length", "detectors", "any_python_model", "calling_the_model", "which_delivery", "on_a_gpu", "release_from_your_ci", "deploy_and_roll_back", "behind_a_corporate_proxy"]
THEN = ["when_something_is_wrong", "looking_into_an_image", "building_images", "deployment_files"]  # tutorials for whoever has released once
WINGS = {"wire": "Wire", "package": "Package", "serving": "Serving", "release": "Release", "notebook": "Notebook", "mends": "Mends", "scaffolds": "Scaffolds", "pipelines": "Pipelines"}
LINK = re.compile(r"\]\((?:nbs/)?((?:[\w.-]+/)*)(?:\d\d_)?([\w-]+)\.ipynb")  # the README is read from the root; a page has no number
GLOSSARY = Path("explanations/glossary.ipynb")
LEFT_ALONE = re.compile(r"(^```.*?^```|`[^`\n]*`|!?\[[^\]]*\]\([^)]*\)|<[^>]+>|^(?:#| {4}).*?$|https?://\S+)", re.S | re.M)
LINE = re.compile(r'<a id="?__codelineno-[^>]*></a>')
PALE = "color:rgb(var(--color-foreground)/.45)"
EXPORTED = re.compile(r"^#\| *exporti?$", re.M)


def signature(f, eval_str=False):
    "Of a function whose types may be imported for type checkers alone: those are shown as they are written"
    try:
        return inspect.signature(f, eval_str=eval_str)
    except NameError:
        return inspect.signature(f)


docments.signature = signature  # here, for each process of nbdev's imports this file


def documents(begin):
    "nbdev documents what a room exports; what a tutorial exports goes into its package, and the reader sees the cell as it stands"
    def begins(self):
        if any("default_exp" in cell.directives_ for cell in self.nb.cells):
            return begin(self)
        self.nb.has_docs_ = False
        for cell in self.nb.cells:
            cell.directives_.pop("export", None)
    return begins


processors.add_show_docs.begin = documents(processors.add_show_docs.begin)


def page_of(notebook):
    "Where the page of a notebook lies, without the numbers that order the rooms"
    return notebook.with_name(re.sub(r"^\d\d_", "", notebook.stem) + ".md")


def title_of(cells):
    return next(found[1] for c in cells if c.cell_type == "markdown" and (found := re.search(r"^# (.+)", c.source, re.M)))


def folded(source):
    "The code of an exported cell, to be opened"
    code = re.sub(r"^#\|.*\n", "", source, flags=re.M).strip()
    names = re.findall(r"^(?:async )?(?:def|class) (\w+)", code, re.M) or re.findall(r"^(\w+) *(?::[^=]+)?=", code, re.M)
    summary = "Source" + (f" of <code>{', '.join(dict.fromkeys(names))}</code>" if names else ": imports" if "import" in code else "")
    return new_markdown_cell(f'<details class="source" markdown="1" data-search-exclude><summary>{summary}</summary>\n\n```python\n{code}\n```\n\n</details>')


def woven(written, processed):
    "The cells of a page: nbdev's, and after what each exported cell offers its code"
    known, rest, cells = {c.id for c in written}, list(processed), []
    while rest and rest[0].id not in known:  # front matter
        rest.pop(0)
    for cell in written:
        if rest and rest[0].id == cell.id:
            cells.append(rest.pop(0))
            if cell.cell_type == "code" and EXPORTED.search(cell.source):
                cells[-1].source = cell.source
        elif cell.cell_type == "code" and EXPORTED.search(cell.source):
            while rest and rest[0].id not in known:
                name = re.search(r"show_doc\(([\w.]+)", rest[0].source)
                if name and not re.search(rf"(?:def|class) {name[1].split('.')[-1]}\b", cell.source):
                    break
                cells.append(rest.pop(0))
            cells.append(folded(cell.source))
    return cells + rest


def slug(text):
    return re.sub(r"[^0-9a-z]+", "-", text.lower()).strip("-")


def glossary():
    "The words of the glossary that are linked, those in italics: the name of the line, and the meaning"
    words = {}
    for line in "".join(c.source + "\n" for c in read(NBS / GLOSSARY, NO_CONVERT).cells).splitlines():
        if row := re.match(r"\| (.+?) \| (.+?) \|", line):
            meaning = re.sub(r"\s*\[[^]]*\]\([^)]*\)\.?$|`", "", row[2])
            words |= {word: (slug(row[1]), meaning) for word in re.findall(r"\*(.+?)\*", row[1])}
    return words


def with_anchors(text):
    "The lines of the glossary, each with a name to link to"
    def named(row):
        return f'| <span id="{slug(row[1])}">{row[1]}</span> |'
    return re.sub(r"^\| (?!word|-)(.+?) \|", named, text, flags=re.M)


def explained(text, place, words, seen):
    "A text in which each word of the glossary is linked where the page uses it first; headings, links and code stay as they are"
    up = "../" * len(place.parent.parts)

    def link(found):
        word = next(w for w in words if w.lower() == found[1].lower().rstrip("s") or w.lower() == found[1].lower())
        name, meaning = words[word]
        if name in seen:
            return found[0]
        seen.add(name)
        return f'[{found[0]}]({up}{page_of(GLOSSARY)}#{name} "{html.escape(meaning)}"){{.term}}'
    some = re.compile(r"(?<![\w/-])(" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + r")s?(?![\w-])", re.I)
    return "".join(part if i % 2 else some.sub(link, part) for i, part in enumerate(LEFT_ALONE.split(text)))


def linked(text):
    "A text whose links lead from page to page"
    return LINK.sub(lambda link: f"]({link[1] or ''}{link[2]}.md", text).replace("](nbs/images/", "](images/")


def prepared(cell, prose):
    "A cell as the exporter wants it: without directives, without the source that is not to be shown, tables in one piece"
    if cell.cell_type != "code":
        if cell.cell_type == "markdown" and not cell.source.startswith("<details"):
            cell.source = prose(cell.source)
        return cell
    if re.search(r"^#\| *echo: *false", cell.source, re.M):
        cell.metadata["tags"] = ["result-only"]
    cell.source = re.sub(r"^#\|(?! *export).*\n?", "", cell.source, flags=re.M)
    for output in cell.outputs:
        data = output.get("data", {})
        text = output.get("text") or (data.get("text/plain") if not data.keys() & {"text/html", "text/markdown", "image/png"} else None)
        if text:
            output.output_type, output["metadata"] = "display_data", {}
            data = output["data"] = {"text/markdown": f'<pre class="result">{html.escape(text.rstrip())}</pre>'}
        if "text/html" in data:
            data["text/html"] = "\n<div class=\"output\">" + re.sub(r"\n\s*", "\n", "".join(data["text/html"])).strip() + "</div>\n"
        if "text/markdown" in data and cell.source.startswith("show_doc"):
            data["text/markdown"] = "".join(data["text/markdown"]).removeprefix("---\n")
    return cell


def markdown(notebook, processed, folder):
    "Write the page of a notebook and its pictures; its title"
    written, nb = read(NBS / notebook, NO_CONVERT), read(processed, NO_CONVERT)
    title, place, words, seen = title_of(written.cells), folder / page_of(notebook), glossary(), set()

    def prose(text):
        return with_anchors(linked(text)) if notebook == GLOSSARY else explained(linked(text), page_of(notebook), words, seen)
    lead = re.search(r"^> (.+)", "".join(written.cells[0].source), re.M)
    rest = re.match(r"# .+\n*(?:> .+\n*)?((?:.|\n)*)", written.cells[0].source)  # nbdev takes the title for front matter, with all that stands there
    before = f"{prose(rest[1])}\n\n" if rest else ""
    nb.cells = [prepared(c, prose) for c in woven(written.cells, nb.cells)]
    if notebook.parts[0] == "reference":  # made from the code: what a reader comes for are the tables
        nb.cells = [c for c in nb.cells if c.cell_type != "code" or c.outputs]
    nb.metadata["language_info"] = {"name": "python"}
    options = Config({"ExtractOutputPreprocessor": {"output_filename_template": place.stem + "_{cell_index}_{index}{extension}"},
        "TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"result-only"}}})
    text, resources = MarkdownExporter(config=options).from_notebook_node(nb)
    place.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in resources["outputs"].items():
        (place.parent / name).write_bytes(picture)
    module = next((found[1].replace(".", "/") for c in written.cells if (found := re.match(r"#\| *default_exp (\S+)", c.source))), None)
    about = {"title": title, "description": lead and lead[1], "notebook": f"{SOURCE}/nbs/{notebook}", "module": module and f"{SOURCE}/mlserve/{module}.py"}
    front = "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in about.items() if value) + "---\n\n"
    head = f"# {title}\n\n" + (f"*{lead[1]}.*\n\n" if lead else "")
    place.write_text(f"{front}{head}{before}{text}\n")
    return title


def navigation(titles):
    "A tab for each thing that a reader comes for; in the last one, a section for each folder of the house, in the order of its numbers"
    def entry(*names):
        return [{titles[n]: str(page_of(n))} for n in names]

    def inside(folder, *left_out):
        return entry(*sorted(n for n in titles if n.parent == Path(folder) and n.stem not in left_out))

    def section(folder):
        below = sorted({n.parents[len(n.parents) - 2 - len(folder.parts)] for n in titles if folder in n.parent.parents})
        return inside(folder) + [{f.name.replace("_", " "): section(f)} for f in below]
    examples = sorted((n for n in titles if n.parts[0] == "examples"), key=lambda n: (n.stem != "start", n))
    folders = {n.parts[0] for n in titles if len(n.parts) > 1} - {"tutorials", "examples", "reference", "explanations"}
    wings = WINGS | {folder: folder.capitalize() for folder in sorted(folders - WINGS.keys())}
    return [{"Start": "index.md"},
        {"Tutorials": [*entry(*(Path(f"tutorials/{name}.ipynb") for name in FIRST)), {"Examples": entry(*examples)}]},
        {"How-to and triage": [*entry(*(Path(f"tutorials/{name}.ipynb") for name in THEN)), *inside("tutorials", *FIRST, *THEN)]},
        {"Reference": [*inside("reference"), *entry(GLOSSARY)]},
        {"The house": [*inside("explanations", "glossary"), {"Ground floor": inside(".", "index")}, *({name: section(Path(folder))} for folder, name in wings.items())]}]


def for_machines(docs, tabs):
    "The contents as llmstxt.org wants them: a line for each page, in the order of the navigation"
    def lines(entries):
        for title, place in (pair for entry in entries for pair in entry.items()):
            if isinstance(place, list):
                yield from lines(place)
                continue
            about = re.search(r"^description: (.+)", (docs / place).read_text(), re.M)
            yield f"- [{title}]({place.removesuffix('.md')}.html)" + (f": {json.loads(about[1])}" if about else "")
    sections = [f"## {name}\n\n" + "\n".join(lines(place if isinstance(place, list) else [{name: place}])) for tab in tabs for name, place in tab.items()]
    return f"# mlserve\n\n> {get_config().description}\n\n" + "\n\n".join(sections) + "\n"


def main(to):
    processed = Path(proc_nbs(force=True))
    with tempfile.TemporaryDirectory() as work:
        docs = Path(work) / "docs"
        notebooks = [p.relative_to(processed) for p in sorted(processed.rglob("*.ipynb"))]
        titles = {n: markdown(n, processed / n, docs) for n in notebooks}
        for asset in ("docs.css", "docs.js"):
            shutil.copy(ROOT / ".ci" / asset, docs)
        shutil.copytree(NBS / "images", docs / "images", dirs_exist_ok=True)
        shutil.copy(ROOT / ".ci/icon.svg", docs / "images")
        shutil.copytree(ROOT / ".ci/theme", Path(work) / "theme")
        tabs = navigation(titles)
        config = (ROOT / ".ci/zensical.toml").read_text().replace("VERSION", get_config().version).replace("REPOSITORY", get_config().git_url)
        (Path(work) / "zensical.toml").write_text(config.replace("nav = []", "nav = " + toml(tabs)))
        done = subprocess.run([Path(sys.executable).parent / "zensical", "build", "--strict", "-f", "zensical.toml"], cwd=work, capture_output=True, text=True)
        if done.returncode:  # a link that leads nowhere, too
            sys.exit(re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr))
        for page in (Path(work) / "site").rglob("*.html"):  # each line of code is a link without a name, and a stop of the tabulator
            page.write_text(LINE.sub("", page.read_text()))
        for script in (Path(work) / "site/assets/javascripts").glob("bundle.*.js"):  # where a result of the search lies is too pale to be read
            script.write_text(script.read_text().replace(PALE, PALE.replace(".45", ".7")))
        (Path(work) / "site/llms.txt").write_text(for_machines(docs, tabs))
        shutil.rmtree(to, ignore_errors=True)
        shutil.move(Path(work) / "site", to)
    shutil.rmtree(processed)


def toml(value):
    "Lists and tables of texts, as TOML writes them in one line"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
