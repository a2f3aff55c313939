"""Make the virtual environment: `python3 tools/environment.py [FOLDER]` (default .venv). Any Python 3 can run this.

What cannot work is said in one line before anything is installed. An environment that is there and has pip is left as
it is, whoever made it (`uv venv --seed` too); one that an interruption left without pip is made again.
"""

import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
KNOWN = ("python3.13", "python3.12", "python3.11", "python3.14")
UV = "pip install uv && uv venv --seed --python 3.12 %s"


def answers(python, code):
    """Whether `python -c code` ends well; False where there is no such program."""
    try:
        return subprocess.call([python, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def new_enough(python):
    return answers(python, "import sys; sys.exit(sys.version_info < (%d, %d))" % OLDEST)


def interpreter(folder):
    """The Python to build on: this one, or a newer one on PATH where this is too old. Exits where there is none."""
    if new_enough(sys.executable):
        return sys.executable
    found = next((path for path in map(shutil.which, KNOWN) if path and new_enough(path)), None)
    mine = "%d.%d" % sys.version_info[:2]
    if found is None:
        sys.exit(
            "hotloop: python3 is %s and 3.11 or newer is needed; bring one with: %s  (then the same command again)"
            % (mine, UV % folder)
        )
    print("hotloop: python3 is %s, older than 3.11; taking %s" % (mine, found), flush=True)
    return found


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else ".venv"
    inside = os.path.join(folder, "bin", "python")
    if not sys.platform.startswith("linux"):
        sys.exit(
            "hotloop: this is %s; hotloop's sandbox and its kernels need Linux (in WSL2 on Windows)" % sys.platform
        )
    if shutil.which("git") is None:
        sys.exit("hotloop: git is not installed; bring it with: apt-get install git")
    if answers(inside, "import pip"):
        if not new_enough(inside):
            sys.exit("hotloop: the Python in %s is older than 3.11; remove that folder and start again" % folder)
        return
    python = interpreter(folder)
    if not answers(python, "import ensurepip, venv"):
        version = subprocess.check_output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
        sys.exit(
            "hotloop: %s cannot make virtual environments; bring that with: apt-get install python%s-venv"
            % (python, version.decode().strip())
        )
    sys.exit(subprocess.call([python, "-m", "venv", "--clear", folder]))


if __name__ == "__main__":
    main()
