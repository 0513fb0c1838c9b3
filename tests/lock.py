"""Write a lock: the exact version of every package in the environment that runs this.

python tests/lock.py requirements.lock
"""

import platform
import re
import subprocess
import sys
from pathlib import Path

HEADER = """\
# The exact versions that the tests were last run with: Python {python} on {system}.
# Use them:      make install LOCKED=1     (they constrain settings.ini's ranges; nothing else is installed)
# Refresh them:  rm -rf .venv && make test && make lock
"""
PIN = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!_-]+")


def pins() -> list[str]:
    "Every installed package as name==version, without pip and this project; refuses all but plain versions."
    command = [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable", "--exclude", "pip"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    lines = [line for line in lines if not re.match(r"lnl[-_]bench\b", line)]
    odd = [line for line in lines if not PIN.fullmatch(line)]
    if odd: sys.exit("not a plain version, so the lock could not be used elsewhere: " + ", ".join(odd))
    return sorted(lines, key=str.lower)


def main() -> None:
    found = pins()
    system = f"{platform.system()} {platform.machine()}"
    header = HEADER.format(python=platform.python_version(), system=system)
    Path(sys.argv[1]).write_text(header + "\n".join(found) + "\n", encoding="utf-8")
    print(f"{len(found)} packages pinned in {sys.argv[1]}")


if __name__ == "__main__": main()
