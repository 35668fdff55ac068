"""The command ``sottovoce server base``: the model that the devices of a campaign answer with."""

import argparse
from pathlib import Path

import platformdirs

_EXAMPLE = """\
examples:
  sottovoce server base movielens --out base --precision int8
  sottovoce server base campaign --key operator --out base

Exports the campaign's base model as one ONNX graph with empty slots, compares it with torch on real texts, and signs
it. Devices get the folder as they get the base's weights, by any way: they take it only under the operator's key they
trusted at their consent. int8 is a quarter of the size and answers within the tolerance that its manifest states.
"""


def add_base(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``server base``."""
    from sottovoce.server_place import add_server_folder

    parser = actions.add_parser(
        "base",
        help="export and sign the model that the devices of a campaign answer with",
        description="Export and sign the model that the devices of a campaign answer with.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("campaign", metavar="CAMPAIGN", help="a campaign of the server by name, or a campaign's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or an earlier export")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="the operator's private key (default: the server's)")
    parser.add_argument("--texts", type=Path, metavar="TXT", help="public texts to compare on, one a line, in UTF-8")
    add_server_folder(parser)
    parser.set_defaults(handler=_base)


def _base(options: argparse.Namespace) -> int:
    from sottovoce.server_place import opened_server

    server = None if options.key and Path(options.campaign).is_dir() else opened_server(options)
    named = server.campaigns / options.campaign if server else None
    folder = named if named and named.is_dir() else Path(options.campaign)
    from client.export.fleet import export_campaign_base  # loads torch
    from client.export.private_head import PROBES
    from shared.protocol.campaign import verify_campaign
    from shared.protocol.signing import fingerprint, load_private

    key = load_private(options.key or server.operator_key)  # type: ignore[union-attr]
    manifest = export_campaign_base(
        verify_campaign(folder, trusted=key.public_key()),
        options.out,
        key=key,
        precision=options.precision,
        probe_texts=_lines(options.texts) if options.texts else PROBES,
        cache=platformdirs.user_cache_path("sottovoce") / "onnx",
    )
    parity, size = manifest["parity"], sum(file["size"] for file in manifest["files"].values())
    print(
        f"base: {options.out.resolve()} ({size / 1e6:.1f} MB, {options.precision}), signed by "
        f"{fingerprint(key.public_key())}\n"
        f"torch and ONNX Runtime on {parity['n_probes']} texts: {parity['measure']} {parity[parity['measure']]:.2g}, "
        f"at most {parity['tolerance']} is allowed"
    )
    return 0


def _lines(path: Path) -> list[str]:
    from shared.errors import HeadError

    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise HeadError(f"--texts must name a readable text file, got {path}: {reason}.") from None
