#!/bin/sh
# What can be checked without a Docker engine but takes too long for `make test`.
#
#   docker/check.sh prometheus            real Prometheus, every panel's query        2 minutes
#   docker/check.sh root [OPTIONS]        the Dockerfile's steps in a Debian root     10 minutes, as root
#
# Options of `root` go to tests/docker/run_in_root.py, for instance --bind /root/.cache/pip. WORK names
# a directory with 5 GB of room.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
what=${1:-}
[ $# -eq 0 ] || shift

case $what in
    prometheus)
        promtool check config --syntax-only docker/prometheus/prometheus.yml
        promtool check rules docker/prometheus/alerts.yml
        exec $python -m tests.docker.live_dashboard
        ;;
    root)
        work=${WORK:-/var/tmp/ponderttt-root}
        if [ ! -e "$work/debian/etc/debian_version" ]; then
            debootstrap --variant=minbase bookworm "$work/debian"
        fi
        .venv/bin/ponderttt models fetch smollm2-135m
        model=$($python -c 'from ponderttt.models import store; print(store.resolve("smollm2-135m"))')
        exec $python -m tests.docker.run_in_root --root "$work/debian" --work "$work/stages" \
            --target cpu --model-cache "$model" "$@"
        ;;
    *)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
