#!/bin/bash
# A profile every night, from cron. In `crontab -e`:
#   0 2 * * *  /path/to/blip2mgm/examples/cron.sh demo
# Nothing has to be set: paths are taken from where this file lies. What is unchanged is kept, a run that was interrupted
# goes on, and one that is still at work is left alone. The log is runs/<profile>.log; cron sends a mail if the run failed.
set -uo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
profile="${1:-demo}"
log="${LOG:-$project/runs/$(basename "$profile").log}"
mkdir -p "$(dirname "$log")"
echo "== $(date '+%F %T') $profile" >>"$log"
"${BLIP2MGM:-$project/.venv/bin/blip2mgm}" run "$profile" "${@:2}" >>"$log" 2>&1
status=$?
if [ "$status" -ne 0 ]; then
  echo "blip2mgm run $profile ended with $status; the end of $log:" >&2
  tail -n 5 "$log" >&2
fi
exit "$status"
