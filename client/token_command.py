"""`carousel token`: a fresh key and the line that lets it in. Calls no server and keeps nothing."""

from __future__ import annotations

import hashlib
import json
import secrets

import click

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_KEY_BYTES = 32
_MOST_CHARACTERS = 128  # of a tenant; the server's limit too


def _tenant(_: click.Context, __: click.Parameter, value: str) -> str:
    if not 1 <= len(value) <= _MOST_CHARACTERS or not value.isprintable() or "/" in value:
        raise click.BadParameter(f"a tenant is 1 to {_MOST_CHARACTERS} printable characters, none of them '/'")
    return value


@click.command(context_settings=_SETTINGS)
@click.option("--tenant", required=True, callback=_tenant, metavar="NAME", help="Whose token it is.")
@click.option("--admin", is_flag=True, help="It opens Control and Inspect, too: the load, everybody's requests, the policy.")
def token(tenant: str, admin: bool) -> None:
    """Make a token for callers of a server that knows its callers (`carousel serve --tokens FILE`).

    The token goes to stderr, once: it is kept nowhere. The line for the server's file goes to stdout, and holds only its hash.

    \b
    Example:
      carousel token --tenant alice >> tokens.jsonl
    """
    key = f"carousel_{secrets.token_urlsafe(_KEY_BYTES)}"
    line = {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": tenant, "admin": admin}
    click.echo(key, err=True)
    click.echo(json.dumps(line, ensure_ascii=False))
