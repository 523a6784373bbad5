#!/usr/bin/env bash
# Starts Triton Inference Server on a bundle; the engine is built first where it is missing.
#   VARIANT=tensorrt      (the default) or onnxruntime
#   ENGINES=/engines      where the engine is kept; delete it after a change of GPU or version
#   further arguments     go to tritonserver
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# MODEL, INPUT, SHAPE, MIN_BATCH, OPT_BATCH, MAX_BATCH
source "$here/bundle.env"
variant=${VARIANT:-tensorrt}
engines=${ENGINES:-/engines}
# trtexec asks a library for its plugins; Triton only opens it, so that it must register itself.
plugin=$here/lib/libvssm_tensorrt.so
autoload=$here/lib/libvssm_tensorrt_autoload.so
PATH=$PATH:$here/bin

build_engine() {
  local gpu name plan
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
    trtexec --onnx="$here/model/model.onnx" --saveEngine="$plan.part" \
      --dynamicPlugins="$plugin" --stronglyTyped \
      --minShapes="$INPUT:${MIN_BATCH}x$SHAPE" --optShapes="$INPUT:${OPT_BATCH}x$SHAPE" \
      --maxShapes="$INPUT:${MAX_BATCH}x$SHAPE" \
      --timingCacheFile="$engines/timing-$name.cache" --skipInference
    mv "$plan.part" "$plan"
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
