/* Stand-ins for libcudart, libcublas, libcurand and the driver with one device of compute capability 9.0 on which nothing happens.

   Device memory is host memory, copies copy, and a launched kernel does nothing: its results are whatever the memory
   held, zeros at first. So Jittor, started on a machine without a GPU, generates the CUDA source of every operation
   and has it compiled and linked, which is all that can be learned here. Built once for each of the libraries,
   with PART_CUDART, PART_CUBLAS, PART_CURAND or PART_CUDA (the driver) defined. Each counts what it was asked to compute, for the test to read. */

#include <stdlib.h>
#include <string.h>

int fake_calls = 0;

#ifdef PART_CUDART
#include <cuda_runtime_api.h>

static const size_t MEMORY = 80ull << 30;

static cudaError_t give(void **pointer, size_t size) {
    *pointer = calloc(1, size ? size : 1);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
static cudaError_t take(void *pointer) { free(pointer); return cudaSuccess; }
static cudaError_t copy(void *to, const void *from, size_t size) { memmove(to, from, size); return cudaSuccess; }

/* The device */
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int device) {
    memset(prop, 0, sizeof(*prop));
    strcpy(prop->name, "a device that does nothing");
    prop->major = 9;
    prop->minor = 0;
    prop->totalGlobalMem = MEMORY;
    prop->multiProcessorCount = 132;
    prop->maxThreadsPerBlock = 1024;
    prop->warpSize = 32;
    return device ? cudaErrorInvalidDevice : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
        default: *value = 0;
    }
    return device ? cudaErrorInvalidDevice : cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { *left = *total = MEMORY; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "an error" : "cudaSuccess"; }
const char *cudaGetErrorString(cudaError_t error) { return error ? "an error" : "no error"; }

/* Memory */
cudaError_t cudaMalloc(void **pointer, size_t size) { return give(pointer, size); }
cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) { return give(pointer, size); }
cudaError_t cudaMallocHost(void **pointer, size_t size) { return give(pointer, size); }
cudaError_t cudaMallocManaged(void **pointer, size_t size, unsigned int flags) { return give(pointer, size); }
cudaError_t cudaFree(void *pointer) { return take(pointer); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return take(pointer); }
cudaError_t cudaFreeHost(void *pointer) { return take(pointer); }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return copy(to, from, size);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, size);
}
cudaError_t cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    return cudaMemset(to, value, size);
}

/* Streams and events: everything is over at once */
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int flags) { *stream = 0; return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = 0; return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) { *event = 0; return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = 1;
    return cudaSuccess;
}

/* Kernels: registered, configured, counted, not run */
static dim3 grid_kept, block_kept;
static size_t shared_kept;
static cudaStream_t stream_kept;
void **__cudaRegisterFatBinary(void *binary) { return calloc(1, sizeof(void *)); }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) { free(handle); }
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, uint3 *thread,
                            uint3 *block, dim3 *block_dim, dim3 *grid_dim, int *warp) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                       int constant, int global) {}
unsigned int __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    grid_kept = grid;
    block_kept = block;
    shared_kept = shared;
    stream_kept = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = grid_kept;
    *block = block_kept;
    *shared = shared_kept;
    *(cudaStream_t *)stream = stream_kept;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { *kernel = (cudaKernel_t)host; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **words, size_t shared,
                               cudaStream_t stream) {
    fake_calls++;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **words, size_t shared,
                             cudaStream_t stream) {
    fake_calls++;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **words) {
    fake_calls++;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    memset(attributes, 0, sizeof(*attributes));
    attributes->ptxVersion = 80; /* Jittor compiles for the least architecture that it is given, 8.0 */
    attributes->binaryVersion = 90;
    attributes->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) {
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads, size_t shared) {
    *blocks = 1;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                   size_t shared, unsigned int flags) {
    *blocks = 1;
    return cudaSuccess;
}
#endif

#ifdef PART_CUBLAS
static int dummy;
int cublasCreate_v2(void **handle) { *handle = &dummy; return 0; }
int cublasDestroy_v2(void *handle) { return 0; }
int cublasSgemm_v2() { return fake_calls++, 0; }
int cublasGemmEx() { return fake_calls++, 0; }
int cublasGemmStridedBatchedEx() { return fake_calls++, 0; }
int cublasSgemmStridedBatched() { return fake_calls++, 0; }
#endif

#ifdef PART_CURAND
static int dummy;
int curandCreateGenerator(void **generator, int type) { *generator = &dummy; return 0; }
int curandDestroyGenerator(void *generator) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void *generator, unsigned long long seed) { return 0; }
int curandGenerateUniform() { return fake_calls++, 0; }
int curandGenerateUniformDouble() { return fake_calls++, 0; }
int curandGenerateNormal() { return fake_calls++, 0; }
int curandGenerateNormalDouble() { return fake_calls++, 0; }
#endif

#ifdef PART_CUDA
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 99000; return 0; } /* younger than every toolkit */
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "a device that does nothing", size); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 80ull << 30; return 0; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { *left = *total = 80ull << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { /* 75, 76: compute capability 9.0 */
    *value = attribute == 75 ? 9 : 0;
    return 0;
}
#endif
