#!/usr/bin/env bash
# Builds the training image of this checkout, and pushes it with --push.
#
#   launch/image.sh --target=cuda|tpu --image=REGISTRY/NAME:TAG [--user=UID] [--push] [--dry-run]
#
# The tag must be given and not be "latest": a restarted job must get the code it began with. The image holds no
# secrets; it is built from the files of the checkout that launch/Dockerfile.dockerignore lets in. It runs as user 1000
# unless told otherwise.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/steps.sh"

target='' image='' user=1000 push=''
parse_options "target= image= user= push" "$@"
need_choice target cuda tpu
need image
need_pinned_image "$image"
need_number user
root=$(dirname "$launch")
revision=$(git -C "$root" describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)

step docker build --platform=linux/amd64 "--file=$launch/Dockerfile" "--build-arg=ACCELERATOR=$target" \
  "--build-arg=REVISION=$revision" "--build-arg=USER_ID=$user" "--tag=$image" "$root"
if [ -n "$push" ]; then step docker push "$image"; fi
