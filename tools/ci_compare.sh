#!/usr/bin/env bash
# Compares the result that gpu-check has just written with the newest committed one of the same GPU. Writes comparison.md,
# also into the job's summary; likewise the profile that it tuned. Exit status: that of the comparison; 0 where there is no
# committed result yet.
set -uo pipefail
cd "$(dirname "$0")/.."
hotloop=${HOTLOOP:-.venv/bin/hotloop}
new=$(git ls-files --others --exclude-standard -- 'bench/results/*/*.json' | sort | tail -n 1)
if [ -z "$new" ]; then
  echo "hotloop: gpu-check left no new result in bench/results; see the step before" >&2
  exit 1
fi
mapfile -t committed < <(git ls-files -- "$(dirname "$new")/*.json" | sort)
if [ "${#committed[@]}" -eq 0 ]; then
  { echo "No result of this GPU is committed yet; commit this one to compare with it:"; echo; cat "${new%.json}.md"; } >comparison.md
  status=0
else
  "$hotloop" bench compare "${committed[-1]}" "$new" >comparison.md
  status=$?
fi
for profile in bench/results/*/work/profile/*.json; do
  [ -e "$profile" ] || continue
  was="kernels/tuned/$(basename "$profile")"
  if [ -e "$was" ]; then
    echo >>comparison.md
    "$hotloop" bench compare --profile "$was" "$profile" >>comparison.md || status=1
  else
    printf '\nNo profile of this GPU is committed yet; commit %s as %s.\n' "$profile" "$was" >>comparison.md
  fi
done
cat comparison.md
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
  cat comparison.md "${new%.json}.md" >>"$GITHUB_STEP_SUMMARY"
fi
exit $status
