#!/usr/bin/env bash
# Starts Triton Inference Server on a bundle; the engine is built first where it is missing.
#   VARIANT=tensorrt      (the default, where the bundle has it) or onnxruntime
#   ENGINES=/engines      where the engine is kept; delete it after a change of GPU or version
#   further arguments     go to tritonserver
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# MODEL, INPUT, SHAPE, MIN_BATCH, OPT_BATCH, MAX_BATCH
source "$here/bundle.env"
variant=tensorrt
[[ -d $here/triton/tensorrt ]] || variant=onnxruntime  # of a model quantised for ONNX Runtime
variant=${VARIANT:-$variant}
engines=${ENGINES:-/engines}
# trtexec asks a library for its plugins; Triton only opens it, so that it must register itself.
plugin=$here/lib/libvssm_tensorrt.so
autoload=$here/lib/libvssm_tensorrt_autoload.so
PATH=$PATH:$here/bin

build_engine() {
  local gpu name plan part
  gpu=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader | head -n 1)
  # An engine is code for one GPU, one model, one plugin and one TensorRT.
  name=$(
    printf '%s\n' "$gpu" "$MIN_BATCH-$OPT_BATCH-$MAX_BATCH" "$(sha256sum < "$plugin")" \
      "$(sha256sum < "$(command -v trtexec)")" "$(sha256sum < "$here/model/model.onnx")" |
      sha256sum | cut -c 1-16
  )
  plan=$engines/$MODEL-$name.plan
  if [[ ! -s $plan ]]; then
    echo "start.sh: building the engine for $gpu into $plan"
    mkdir -p "$engines"
    # A name of our own: another server may be building the same engine into the same volume.
    part=$(mktemp "$plan.XXXXXX")
    # shellcheck disable=SC2064  # the name is known now
    trap "rm -f '$part'" EXIT
    # float32 is float32: TF32, which trtexec allows unasked, has ten bits of mantissa.
    trtexec --onnx="$here/model/model.onnx" --saveEngine="$part" \
      --dynamicPlugins="$plugin" --stronglyTyped --noTF32 \
      --minShapes="$INPUT:${MIN_BATCH}x$SHAPE" --optShapes="$INPUT:${OPT_BATCH}x$SHAPE" \
      --maxShapes="$INPUT:${MAX_BATCH}x$SHAPE" \
      --timingCacheFile="$engines/timing-$name.cache" --skipInference
    if [[ ! -s $part ]]; then
      echo "start.sh: trtexec ended well but wrote no engine; see its messages above" >&2
      exit 1
    fi
    chmod a+r "$part"
    mv "$part" "$plan"
  fi
  ln -sfn "$plan" "$here/triton/tensorrt/$MODEL/1/model.plan"
}

case $variant in
  tensorrt)
    build_engine
    exec tritonserver --model-repository="$here/triton/tensorrt" \
      --backend-config="tensorrt,plugins=$autoload" "$@"
    ;;
  onnxruntime)
    exec tritonserver --model-repository="$here/triton/onnxruntime" "$@"
    ;;
  *)
    echo "start.sh: VARIANT=$variant is not tensorrt or onnxruntime; set one of these" >&2
    exit 2
    ;;
esac
