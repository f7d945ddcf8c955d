#!/bin/sh
# Make .venv from a lock: `envs/install.sh LOCK`, run by every make target. Quick when nothing changed; a changed lock,
# another Python or an interrupted installation starts afresh, since pip takes half-written packages for whole ones.
# PYTHON: the interpreter to use. TORCH_INDEX_URL: a wheel index to find torch on, beside pip's own.
set -eu
cd "$(dirname "$0")/.."
lock=$1
venv=.venv
pip_version=26.3

die() {
    printf '\nerror: %s\n' "$1" >&2
    exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || echo "no Python"; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11}; do
        case $(version_of "$candidate") in
            3.11.* | 3.12.* | 3.13.*) python=$candidate && return ;;
        esac
    done
    asked=${PYTHON:-python3}
    die "$asked is $(version_of "$asked"), but dayzero needs Python 3.11, 3.12 or 3.13: install one, or name it: make env PYTHON=/path/to/python3.12"
}

last_error() { grep -E '^ *(ERROR|error):' "$venv/install.log" | tail -n 1 | sed 's/^ *//' | cut -c 1-300; }

# pip with one line of progress in place of its hundreds; $1 says what is being installed
pip_install() {
    what=$1
    shift
    status=$venv/install.status
    { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" 2>&1 || echo $? >"$status"; } |
        tee -a "$venv/install.log" |
        awk -v what="$what" -v total="$total" -v tty="$tty" '
            /^(Collecting|Processing|Obtaining|Requirement already satisfied:)/ { n++; name = $0; sub(/^[A-Za-z ]+:? /, "", name); sub(/ .*/, "", name) }
            /^(Collecting|Processing)/ && tty { printf "\r\033[K%s: %d/%d %s", what, n, total, name; fflush() }
            /^Installing collected packages/ { printf "%s%s: unpacking %d packages\n", (tty ? "\r\033[K" : ""), what, n; fflush() }'
    if [ -e "$status" ]; then
        rm -f "$status"
        return 1
    fi
}

find_python
[ -f "$lock" ] || die "LOCK=$lock does not exist: use envs/lock-cpu.txt or envs/lock-gpu.txt"
stamp=$("$python" -c 'import hashlib, sys
key = (sys.version_info[:2], sys.argv[2], open(sys.argv[1]).read())
print(hashlib.sha256(repr(key).encode()).hexdigest()[:16])' "$lock" "$PWD")
[ -e "$venv/installed-$stamp" ] && exit 0

"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
if [ -t 1 ]; then tty=1; else tty=0; fi
echo "installing $lock into $venv with $python ($(version_of "$python")); about 3 minutes and 4 GB the first time"
rm -rf "$venv" || die "cannot remove the old $venv: make it writable"
"$python" -m venv "$venv" || die "cannot make $venv: is the disk full or read-only?"

# the first, small download shows whether an index can be reached at all
total=2
pip_install "pip" --retries 1 --timeout 20 "pip==$pip_version" "$(grep '^setuptools==' "$lock")" ||
    die "no package index answers (pip: $(last_error)): check the network or proxy, or name a mirror in PIP_INDEX_URL"
total=8
pip_install "torch" ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --constraint "$lock" "$(grep '^torch==' "$lock")" ||
    die "torch cannot be installed (pip: $(last_error)); the whole log: $venv/install.log"
total=$(grep -c '==' "$lock")
pip_install "the other packages" --no-deps --no-build-isolation --requirement "$lock" ||
    die "the packages of $lock cannot be installed (pip: $(last_error)); the whole log: $venv/install.log"
total=1
pip_install "dayzero" --no-deps --no-build-isolation --editable . ||
    die "dayzero itself cannot be installed (pip: $(last_error)); the whole log: $venv/install.log"
touch "$venv/installed-$stamp"
