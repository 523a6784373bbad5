# Sets VSSM_HAS_CUDA, and the language CUDA where it is on.
set(VSSM_HAS_CUDA OFF)
if(NOT VSSM_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER)
    # Where CUDA's installer and pip's compiler package put nvcc, for who has it not in the PATH.
    find_program(
      VSSM_NVCC
      nvcc
      HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" "/usr/local/cuda/bin"
    )
    if(VSSM_NVCC)
      set(CMAKE_CUDA_COMPILER "${VSSM_NVCC}")
    endif()
  endif()
  # CMake refuses to enable the language without a list; each target sets its own.
  set(CMAKE_CUDA_ARCHITECTURES "${VSSM_CUDA_ARCHITECTURES}")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(VSSM_HAS_CUDA ON)
    message(STATUS "vssm: CUDA kernels for ${VSSM_CUDA_ARCHITECTURES}")
  elseif(VSSM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "VSSM_CUDA=ON, but there is no nvcc; put it in the PATH or set CUDA_HOME")
  endif()
endif()
if(NOT VSSM_HAS_CUDA)
  message(STATUS "vssm: left out: CUDA kernels, TensorRT plugin (nvcc in the PATH or CUDA_HOME)")
endif()
