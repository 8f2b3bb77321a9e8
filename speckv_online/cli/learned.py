"""``speckv learned``: what ``--remember`` kept."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from speckv_online.console import say
from speckv_online.errors import UserError

if TYPE_CHECKING:
    from speckv_online.learned.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    verbs = parser.add_subparsers(required=True, metavar="list|show|forget")
    verb = verbs.add_parser("list", help="list the states, latest first")
    verb.set_defaults(command=list_states)
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb = verbs.add_parser("show", help="show all that is known of a state")
    verb.set_defaults(command=show)
    verb.add_argument("key", metavar="KEY", help="of `speckv learned list`; its beginning will do")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb = verbs.add_parser("forget", help="delete a state, or all")
    verb.set_defaults(command=forget)
    verb.add_argument("key", metavar="KEY", nargs="?", help="of `speckv learned list`; its beginning will do")
    verb.add_argument("--all", action="store_true", help="delete all, those that were set aside too")


def list_states(arguments: argparse.Namespace) -> None:
    """Run ``speckv learned list``."""
    from speckv_online.learned.store import Store

    store = Store()
    entries = store.entries()
    damaged = [path.name for path in store.damaged()] + [f"{name}.npz" for name, head in entries.items() if not head]
    found = {name: _facts(head) for name, head in entries.items() if head}
    if arguments.json:
        states = [{"name": name, **facts} for name, facts in found.items()]
        print(json.dumps({"folder": str(store.folder), "states": states, "damaged": damaged}))
        return
    if not found:
        print(f"nothing is remembered in {store.folder}: decode with --remember")
    else:
        heads = ("KEY", "POLICY", "LEVEL", "TARGET", "DRAFT", "STEPS", "TOKENS", "UPDATED", "DEVICE")
        rows = [heads, *(_row(name, facts) for name, facts in found.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if damaged:
        say(f"damaged: {', '.join(damaged)} in {store.folder}")


def show(arguments: argparse.Namespace) -> None:
    """Run ``speckv learned show``."""
    from speckv_online.learned.store import Damaged, Store, read_file

    store = Store()
    name = find(store, arguments.key)
    try:
        entry = read_file(store.path(name))
    except Damaged as reason:
        raise UserError(f"{store.path(name)} cannot be read: {reason}; speckv learned forget {name}") from reason
    facts = {"name": name, "file": str(store.path(name)), **_facts(entry.header)}
    facts["arrays"] = {key: list(value.shape) for key, value in sorted(entry.state.items())}
    if arguments.json:
        print(json.dumps(facts))
        return
    names = {f"{role} name": text for role, text in facts.pop("names").items()}
    arrays = {"arrays": ", ".join(facts.pop("arrays"))}
    for label, text in (facts.pop("key") | names | facts | arrays).items():
        print(f"{label:<12}  {text}")


def forget(arguments: argparse.Namespace) -> None:
    """Run ``speckv learned forget``."""
    from speckv_online.learned.store import Store

    if bool(arguments.key) == arguments.all:
        raise UserError("name a state, or give --all")
    store = Store()
    if arguments.all:
        aside = [path.name.partition(".")[0] for path in store.damaged()]
        names = sorted({*store.entries(), *aside})
    else:
        names = [find(store, arguments.key)]
    if names:
        store.forget(names)
    print(f"forgotten: {', '.join(names)}" if names else f"nothing is remembered in {store.folder}")


def find(store: Store, key: str) -> str:
    """Return the name of the one state that a key's beginning means; raises :class:`UserError` if there is none."""
    found = [name for name in store.entries() if name.startswith(key)] if key else []
    if len(found) != 1:
        what = f"{len(found)} states begin" if found else "no state begins"
        raise UserError(f"{what} with '{key}': see `speckv learned list`")
    return found[0]


def _facts(header: dict[str, Any]) -> dict[str, Any]:
    """Return a header as it is shown; files may come from anywhere, and names in them be anything."""
    names = header.get("names")
    names = {k: str(v) for k, v in names.items()} if isinstance(names, dict) else {}
    rest = {k: header[k] for k in ("steps", "tokens", "created", "updated")}
    return {"key": header["key"], "names": names, **rest, "version": str(header.get("version", ""))}


def _row(name: str, facts: dict[str, Any]) -> tuple[str, ...]:
    key, names = facts["key"], facts["names"]
    level = str(key["level"]) if key["rows"] == 1 else f"{key['level']}@{key['rows']}"
    models = (names.get(role, str(key[role])[:12]) for role in ("target", "draft"))
    return (
        name, str(key["policy"]), level, *models, str(facts["steps"]), str(facts["tokens"]), facts["updated"],
        f"{key['device']}, {key['engine']}",
    )  # fmt: skip
