#!/bin/sh
# Make what compose.yaml mounts as secrets, in docker/secrets; never overwrites.
#
#   docker/secrets.sh                                     with the image ponderttt:cpu
#   PONDERTTT=.venv/bin/ponderttt docker/secrets.sh       with an installation
#
# Containers run as users of their own, which have to read the files: so the files are readable, and
# the directory is closed to others on this machine.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${PONDERTTT:=docker run --rm ponderttt:cpu}"
case $PONDERTTT in .*) PONDERTTT=$PWD/$PONDERTTT ;; esac
cd "${SECRETS:-$here}"
mkdir -p secrets
chmod 700 secrets
cd secrets
if [ -e keys.toml ]; then
    echo "$PWD/keys.toml exists; move it away to make new keys" >&2
    exit 1
fi

key() { # NAME SCOPE FILE: an entry in the file of keys, the key itself in FILE
    # shellcheck disable=SC2086
    if ! $PONDERTTT keys new --id "$1" --scope "$2" 2>key.tmp >>keys.tmp; then
        cat key.tmp >&2
        rm key.tmp keys.tmp
        exit 1
    fi
    head -n 1 key.tmp | tr -d '\n' >"$3"
    rm key.tmp
}
rm -f keys.tmp
key user completions user.key
key bench completions bench.key
key prometheus metrics metrics.key
head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' >grafana.password
mv keys.tmp keys.toml
chmod 644 ./*
echo "made in $PWD: user.key (for you), bench.key, metrics.key, keys.toml, grafana.password (admin)"
