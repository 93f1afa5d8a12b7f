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
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from nbformat import NO_CONVERT, read
from nbformat.v4 import new_markdown_cell
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
WINGS = {"tutorials": "Tutorials", "examples": "Examples", "reference": "Reference", "explanations": "Explanations", "wire": "Wire", "package": "Package", "serving": "Serving", "release": "Release", "notebook": "Notebook", "mends": "Mends", "scaffolds": "Scaffolds"}
TUTORIALS = ["my_own_model", "which_model", "any_python_model", "calling_the_model", "which_delivery", "on_a_gpu", "release_from_your_ci", "deploy_and_roll_back", "deployment_files", "behind_a_corporate_proxy"]
LINK = re.compile(r"\]\((?:nbs/)?((?:[\w.-]+/)*)(?:\d\d_)?([\w-]+)\.ipynb")  # the README is read from the root; a page has no number
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
        elif cell.cell_type == "code" and EXPORTED.search(cell.source):
            while rest and rest[0].id not in known:
                name = re.search(r"show_doc\(([\w.]+)", rest[0].source)
                if name and not re.search(rf"(?:def|class) {name[1].split('.')[-1]}\b", cell.source):
                    break
                cells.append(rest.pop(0))
            cells.append(folded(cell.source))
    return cells + rest


def linked(text):
    "A text whose links lead from page to page"
    return LINK.sub(lambda link: f"]({link[1] or ''}{link[2]}.md", text)


def prepared(cell):
    "A cell as the exporter wants it: without directives, without the source that is not to be shown, tables in one piece"
    if cell.cell_type != "code":
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source)
        return cell
    if re.search(r"^#\| *echo: *false", cell.source, re.M):
        cell.metadata["tags"] = ["result-only"]
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
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
    title, place = title_of(written.cells), folder / page_of(notebook)
    lead = re.search(r"^> (.+)", "".join(written.cells[0].source), re.M)
    nb.cells = [prepared(c) for c in woven(written.cells, nb.cells)]
    nb.metadata["language_info"] = {"name": "python"}
    options = Config({"ExtractOutputPreprocessor": {"output_filename_template": place.stem + "_{cell_index}_{index}{extension}"},
        "TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"result-only"}}})
    text, resources = MarkdownExporter(config=options).from_notebook_node(nb)
    place.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in resources["outputs"].items():
        (place.parent / name).write_bytes(picture)
    source = f"{get_config().git_url}/blob/main/nbs/{notebook}"
    front = f"---\ntitle: {json.dumps(title)}\n" + (f"description: {json.dumps(lead[1])}\n" if lead else "") + "---\n\n"
    head = f"# {title}\n\n" + (f"*{lead[1]}.*\n\n" if lead else "")
    rest = re.match(r"# .+\n*(?:> .+\n*)?((?:.|\n)*)", written.cells[0].source)  # nbdev takes the title for front matter, with all that stands there
    head += f"{linked(rest[1])}\n\n" if rest else ""
    place.write_text(f'{front}{head}{text}\n\n<p class="notebook"><a href="{source}">The notebook of this page</a></p>\n')
    return title


def navigation(titles):
    "Tutorials first; then a section for each folder of the house, in the order of its numbers"
    def section(folder):
        ordered = sorted(titles, key=lambda n: (TUTORIALS.index(n.stem) if n.stem in TUTORIALS else len(TUTORIALS), n))
        pages = [{titles[n]: str(page_of(n))} for n in ordered if n.parent == folder]
        below = sorted({n.parents[len(n.parents) - 2 - len(folder.parts)] for n in titles if folder in n.parent.parents})
        return pages + [{f.name.replace("_", " "): section(f)} for f in below]
    ground = [{titles[n]: str(page_of(n))} for n in sorted(titles) if n.parent == Path(".") and n.stem != "index"]
    wings = [{name: section(Path(folder))} for folder, name in WINGS.items()]
    return [{"Start": "index.md"}, *wings[:4], {"Ground floor": ground}, *wings[4:], {"Pipelines": section(Path("pipelines"))}]


def for_machines(docs, titles):
    "The contents as llmstxt.org wants them: a line for each page"
    about = {n: re.search(r"^description: (.+)", (docs / page_of(n)).read_text(), re.M) for n in titles}
    lines = [f"- [{titles[n]}]({page_of(n).with_suffix('.html')})" + (f": {json.loads(about[n][1])}" if about[n] else "") for n in titles]
    return f"# mlserve\n\n> {get_config().description}\n\n## Pages\n\n" + "\n".join(lines) + "\n"


def main(to):
    processed = Path(proc_nbs(force=True))
    with tempfile.TemporaryDirectory() as work:
        docs = Path(work) / "docs"
        notebooks = [p.relative_to(processed) for p in sorted(processed.rglob("*.ipynb"))]
        titles = {n: markdown(n, processed / n, docs) for n in notebooks}
        for asset in ("docs.css", "docs.js"):
            shutil.copy(ROOT / ".ci" / asset, docs)
        shutil.copytree(NBS / "images", docs / "images", dirs_exist_ok=True)
        config = (ROOT / ".ci/zensical.toml").read_text().replace("VERSION", get_config().version)
        (Path(work) / "zensical.toml").write_text(config.replace("nav = []", "nav = " + toml(navigation(titles))))
        done = subprocess.run([Path(sys.executable).parent / "zensical", "build", "--strict", "-f", "zensical.toml"], cwd=work, capture_output=True, text=True)
        if done.returncode:  # a link that leads nowhere, too
            sys.exit(re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr))
        for page in (Path(work) / "site").rglob("*.html"):  # each line of code is a link without a name, and a stop of the tabulator
            page.write_text(LINE.sub("", page.read_text()))
        for script in (Path(work) / "site/assets/javascripts").glob("bundle.*.js"):  # where a result of the search lies is too pale to be read
            script.write_text(script.read_text().replace(PALE, PALE.replace(".45", ".7")))
        (Path(work) / "site/llms.txt").write_text(for_machines(docs, titles))
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
