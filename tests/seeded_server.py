"""A server that takes only replies with seeded noise, for a test: SERVER CAMPAIGN."""

import sys
from pathlib import Path

from server.folder import open_server
from server.service import serve
from shared.protocol.campaign import verify_campaign
from shared.protocol.signing import load_public


def main(folder: str, campaign: str) -> None:
    server = open_server(Path(folder))
    published = verify_campaign(server.campaigns / campaign, trusted=load_public(server.operator_public))
    serve(server, published, host="127.0.0.1", accept_seeded=True, on_state=lambda text: print(text, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
