# Sets VSSM_HAS_CUDA, and the language CUDA where it is on.
set(VSSM_HAS_CUDA OFF)

if(NOT VSSM_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER)
    # Where CUDA's installer puts nvcc, for who has it not in the PATH.
    find_program(
      VSSM_NVCC
      nvcc
      HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" "/usr/local/cuda/bin"
    )
    if(VSSM_NVCC)
      set(CMAKE_CUDA_COMPILER "${VSSM_NVCC}")
    else()
      # And pip's packages: nvidia-cuda-nvcc of CUDA 13, with what it depends on.
      set(vssm_python "${Python_EXECUTABLE}")
      if(NOT vssm_python)
        find_program(VSSM_PYTHON python3 HINTS "$ENV{VIRTUAL_ENV}/bin")
        set(vssm_python "${VSSM_PYTHON}")
      endif()
      execute_process(
        COMMAND "${vssm_python}" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
        OUTPUT_VARIABLE pip_packages
        OUTPUT_STRIP_TRAILING_WHITESPACE
        ERROR_QUIET
      )
      file(GLOB pip_nvcc "${pip_packages}/nvidia/cu[0-9]*/bin/nvcc")
      if(pip_nvcc)
        list(GET pip_nvcc -1 pip_nvcc)
        set(CMAKE_CUDA_COMPILER "${pip_nvcc}")
        # The packages have lib where nvcc looks for lib64.
        cmake_path(GET pip_nvcc PARENT_PATH pip_bin)
        cmake_path(GET pip_bin PARENT_PATH pip_cuda)
        set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${pip_cuda}/lib")
      endif()
    endif()
  endif()
  # An older nvcc does not know every GPU of the list. CMake would take its refusal for no nvcc.
  if(CMAKE_CUDA_COMPILER)
    execute_process(
      COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch
      OUTPUT_VARIABLE vssm_nvcc_knows
      ERROR_QUIET
    )
  endif()
  set(vssm_unknown "")
  if(vssm_nvcc_knows MATCHES "compute_")
    string(REGEX REPLACE "[ \t\r\n]+" ";" vssm_nvcc_knows "${vssm_nvcc_knows}")
    foreach(architecture IN LISTS VSSM_CUDA_ARCHITECTURES)
      string(REGEX REPLACE "-(real|virtual)$" "" number "${architecture}")
      if(number MATCHES "^[0-9]+$" AND NOT "compute_${number}" IN_LIST vssm_nvcc_knows)
        list(APPEND vssm_unknown "${architecture}")
      endif()
    endforeach()
  endif()
  if(vssm_unknown AND VSSM_CUDA_ARCHITECTURES STREQUAL vssm_known_architectures)
    # Nobody asked for these: the rest is compiled, its newest as PTX too.
    list(REMOVE_ITEM VSSM_CUDA_ARCHITECTURES ${vssm_unknown})
    list(POP_BACK VSSM_CUDA_ARCHITECTURES newest)
    string(REPLACE "-real" "" newest "${newest}")
    list(APPEND VSSM_CUDA_ARCHITECTURES "${newest}")
    message(
      STATUS
      "vssm: left out: CUDA kernels for ${vssm_unknown}, unknown to ${CMAKE_CUDA_COMPILER} (newer CUDA)"
    )
  elseif(vssm_unknown)
    message(
      FATAL_ERROR
      "VSSM_CUDA_ARCHITECTURES=${VSSM_CUDA_ARCHITECTURES}: ${CMAKE_CUDA_COMPILER} does not know ${vssm_unknown}; leave them out, or take a newer CUDA"
    )
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
    message(
      FATAL_ERROR
      "VSSM_CUDA=ON, but there is no nvcc; put it in the PATH, set CUDA_HOME or pip install nvidia-cuda-nvcc"
    )
  endif()
endif()
if(NOT VSSM_HAS_CUDA)
  message(
    STATUS
    "vssm: left out: CUDA kernels, TensorRT plugin (nvcc in the PATH, CUDA_HOME or pip)"
  )
endif()
