"""The pages that list every key of a file: the experiment's, and those of the other files together."""

import re
from collections.abc import Iterator

from skippipe.config.reference import FileKind, KeyReference, file_reference

CONFIGURATION = """# Configuration: every key of an experiment

An experiment is one YAML file. A key that is not given has the default below. The same stands in the terminal:

```bash
skippipe config --explain pipeline.skip_ratio
skippipe config --explain training
```

Every key can be overridden on the command line: `skippipe train --config EXPERIMENT training.max_steps=20`. A file may
build on another with `base: other.yaml`, and then holds only what differs. The command line wins over the file, the
file over its base files, these over the defaults. An unknown key is an error that names the nearest right one.

`null` stands for "not given". The [glossary](glossary.md) says what each term means, [training](training.md) how to
write an experiment.
"""

FILES = """# Keys of the cluster, problem and plan files

The pages on [clusters](clusters.md), [planning](planning.md) and [the plan file](plan-file.md) tell how these files are
used. The same stands in the terminal:

```bash
skippipe config --of cluster --explain nodes.memory_gib
```
"""
OTHER_FILES: dict[FileKind, str] = {
    "cluster": "YAML. Nodes and the links between them: `cluster:` of an experiment names such a file.",
    "problem": "JSON. A problem needs neither a model nor a cluster: every cost is given in seconds.",
    "plan": "JSON, one line. What `skippipe plan` writes; `skippipe validate` proves it.",
}


def configuration_page() -> str:
    """Return the page of the experiment's keys."""
    keys = file_reference("experiment")
    plain = [key for key in keys if not key.keys]
    parts = [CONFIGURATION, "## Top level\n", *(_key(key, "") for key in plain)]
    for key in keys:
        if key.keys:
            parts += _section(key, "", known={})
    return "\n".join(parts)


def files_page() -> str:
    """Return the page of the keys of all other files; what two of them share is told once."""
    parts, known = [FILES], dict[tuple[KeyReference, ...], str]()
    for kind, about in OTHER_FILES.items():
        keys, prefix = file_reference(kind), f"{kind}: "
        parts += [f"## The {kind} file\n", f"{about}\n"]
        parts += [_key(key, prefix) for key in keys if not key.keys]
        for key in keys:
            if key.keys:
                parts += _section(key, prefix, known)
    return "\n".join(parts)


def _section(section: KeyReference, prefix: str, known: dict[tuple[KeyReference, ...], str]) -> Iterator[str]:
    """Yield a section's own part of a page, then what it holds; `known` says where equal sections stand already."""
    heading = f"{prefix}{section.name}"
    level = "##" if not prefix and "." not in section.name else "###"
    yield _key(section, prefix, level)
    if section.keys in known:
        yield f"Its keys are those of [{known[section.keys]}](#{anchor(known[section.keys])}).\n"
        return
    known[section.keys] = heading
    for key in section.keys:
        if key.keys:
            yield from _section(key, prefix, known)
        else:
            yield _key(key, prefix)


def _key(key: KeyReference, prefix: str, level: str = "###") -> str:
    facts = [f"**Type:** {key.type}"]
    if key.required:
        facts.append("has to be given")
    elif key.default is not None:
        facts.append(f"**default:** `{key.default}`" if key.default else "**default:** empty")
    heading = f"{level} {prefix}`{key.name}`"
    return f"{heading}\n\n{_linked(key.meaning)}\n\n{' · '.join(facts)} · **example:** `{key.assignment}`\n"


def _linked(text: str) -> str:
    """Return text in which the names of pages are links."""
    return re.sub(r"docs/(([\w-]+)\.md)", r"[\2](\1)", text)


def anchor(heading: str) -> str:
    """Return the anchor of a heading, which is the same on the site and on code hosts."""
    return re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
