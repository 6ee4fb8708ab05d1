#!/usr/bin/env bash
# MMBench dev in Chinese: circular accuracy, and the sheet of the OpenCompass server.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate mmbench_cn mmbench_cn "$@"
submit mmbench_cn xlsx "$@"
