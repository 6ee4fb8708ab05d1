#!/usr/bin/env bash
# LLaVA-Bench (In-the-Wild), 60 questions. The judge's reviews are scored by: llava score llava-bench --answers REVIEWS
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate llava-bench llava-bench-in-the-wild "$@"
