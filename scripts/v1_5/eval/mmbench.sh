#!/usr/bin/env bash
# MMBench dev, 4,377 rows: circular accuracy, and the sheet of the OpenCompass server.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate mmbench mmbench "$@"
submit mmbench xlsx "$@"
