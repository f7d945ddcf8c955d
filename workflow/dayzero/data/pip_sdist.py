"""Download a package's source archive without running any of its code.

    python -m dayzero.data.pip_sdist NAME==VERSION FOLDER

`pip download` runs a source archive's build script to learn its dependencies, which are not wanted here. So pip only
finds and fetches the archive, with its own settings (index, mirrors, proxies, certificates, passwords). These parts of
pip are not a public interface: should they change, this fails and says so, and never falls back to running code.
Prints {"file": NAME} or {"versions": [...]} of what exists instead, with exit code 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path


def main(requirement: str, folder: Path) -> int:
    from pip._internal.commands import create_command
    from pip._internal.network.utils import HEADERS
    from pip._internal.req.constructors import install_req_from_line

    wanted = install_req_from_line(requirement)
    assert wanted.req is not None
    command = create_command("download")
    with command.main_context():
        options, _ = command.parse_args(["--no-deps", "--no-input", "--retries", "2"])
        session = command.get_default_session(options)  # type: ignore[attr-defined]
        finder = command._build_package_finder(options, session, ignore_requires_python=True)  # type: ignore[attr-defined]
        candidates = finder.find_all_candidates(wanted.req.name)
        matching = [
            c for c in candidates if not c.link.is_wheel and wanted.req.specifier.contains(c.version, prereleases=True)
        ]
        if not matching:
            print(json.dumps({"versions": [str(v) for v in sorted({c.version for c in candidates})]}))
            return 1
        link = matching[0].link
        with session.get(link.url_without_fragment, headers=HEADERS, stream=True) as response:
            response.raise_for_status()
            content = b"".join(response.iter_content(1 << 20))
    if link.hash and hashlib.new(link.hash_name, content).hexdigest() != link.hash:
        print(f"{link.filename} does not have the {link.hash_name} the index gives for it", file=sys.stderr)
        return 1
    (folder / link.filename).write_bytes(content)
    print(json.dumps({"file": link.filename}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
