// A CUDA runtime, driver and cuBLAS that accept every call and compute nothing.
//
// torch's dispatcher, autograd, memory allocator and choice of attention kernels run as on a GPU. Device memory is
// address space that is never touched, kernels and matrix products are only counted. build.py adds a function that
// returns 0 for each further symbol that torch needs.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

constexpr size_t kGiB = 1ull << 30;
constexpr size_t kTouched = 1 << 20;  // larger copies to the device are not carried out
constexpr int kDriverVersion = CUDART_VERSION;

// Everything that is counted. It is never destroyed, because torch calls the runtime until the process has ended.
struct State {
  std::mutex mutex;
  std::map<uintptr_t, size_t> blocks;                      // start -> bytes of device memory
  std::unordered_map<unsigned long long, size_t> handles;  // physical memory of expandable segments
  std::map<std::string, long> calls;
  std::unordered_map<const void*, std::string> kernel_names;
  std::unordered_map<const void*, long> kernel_launches;
  size_t used = 0;
  void (*on_wait)(const char*) = nullptr;
};

State& state() {
  static State* instance = new State;
  return *instance;
}

using Lock = std::lock_guard<std::mutex>;

std::atomic<uintptr_t> next_id{0x1000};

template <typename T>
cudaError_t give_id(T* out) {
  *out = (T)(uintptr_t)(next_id += 16);
  return cudaSuccess;
}

size_t total_memory() {
  const char* gib = getenv("PRETENDED_GPU_GIB");
  return static_cast<size_t>((gib ? atof(gib) : 80.0) * kGiB);
}

void count(const char* name) {
  Lock lock(state().mutex);
  state().calls[name]++;
}

// The host waits for the device here: the listener finds out where.
void wait(const char* name) {
  count(name);
  if (state().on_wait) state().on_wait(name);
}

void launch(const void* kernel) {
  Lock lock(state().mutex);
  state().calls["kernel"]++;
  state().kernel_launches[kernel]++;
}

void* reserve_addresses(size_t bytes) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  Lock lock(state().mutex);
  state().blocks[reinterpret_cast<uintptr_t>(start)] = bytes;
  return start;
}

size_t release_addresses(void* start) {
  Lock lock(state().mutex);
  auto block = state().blocks.find(reinterpret_cast<uintptr_t>(start));
  if (block == state().blocks.end()) return 0;
  size_t bytes = block->second;
  munmap(start, bytes);
  state().blocks.erase(block);
  return bytes;
}

bool take_memory(size_t bytes) {
  Lock lock(state().mutex);
  if (state().used + bytes > total_memory()) return false;
  state().used += bytes;
  return true;
}

bool on_device(const void* pointer) {
  Lock lock(state().mutex);
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = state().blocks.upper_bound(address);
  if (after == state().blocks.begin()) return false;
  auto block = std::prev(after);
  return address < block->first + block->second;
}

cudaError_t copy(void* to, const void* from, size_t bytes, bool blocking) {
  bool to_device = on_device(to), from_device = on_device(from);
  if (!(to_device && bytes >= kTouched)) memmove(to, from, bytes);
  if (to_device && from_device)
    count("copy on the device");
  else if (to_device)
    blocking ? wait("blocking copy to the device") : count("copy to the device");
  else if (from_device)
    blocking ? wait("blocking copy to the host") : count("copy to the host");
  return cudaSuccess;
}

int zero(...) { return 0; }

}  // namespace

extern "C" {

// Read by count.py.
long pretended_gpu_count(const char* name) {
  Lock lock(state().mutex);
  auto found = state().calls.find(name);
  return found == state().calls.end() ? 0 : found->second;
}
void pretended_gpu_called(const char* name) { count(name); }
void pretended_gpu_on_wait(void (*listener)(const char*)) { state().on_wait = listener; }
void pretended_gpu_reset() {
  Lock lock(state().mutex);
  state().calls.clear();
  state().kernel_launches.clear();
}
void pretended_gpu_kernels(void (*each)(const char*, long)) {
  Lock lock(state().mutex);
  for (auto& [kernel, launches] : state().kernel_launches) {
    auto name = state().kernel_names.find(kernel);
    each(name == state().kernel_names.end() ? "?" : name->second.c_str(), launches);
  }
}

// Devices: one H100.
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = kDriverVersion, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = kDriverVersion, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "pretended H100");
  p->totalGlobalMem = total_memory();
  p->major = 9;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 50 << 20;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxBlocksPerMultiProcessor = 32;
  p->memoryBusWidth = 5120;
  p->unifiedAddressing = p->concurrentKernels = 1;
  p->asyncEngineCount = 3;
  p->textureAlignment = 512;
  p->memPitch = 2147483647;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) { return snprintf(id, size, "0000:00:00.0"), cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->binaryVersion = a->ptxVersion = 90;
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  a->maxDynamicSharedSizeBytes = 227 << 10;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) { return *n = 2, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  return *n = 2, cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "error of the pretended GPU"; }
const char* cudaGetErrorName(cudaError_t) { return "pretended GPU"; }

// Memory.
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  count("cudaMalloc");
  bytes = (bytes + 4095) / 4096 * 4096;
  if (!take_memory(bytes)) return cudaErrorMemoryAllocation;
  *pointer = reserve_addresses(bytes ? bytes : 4096);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  wait("cudaFree");
  size_t bytes = release_addresses(pointer);
  Lock lock(state().mutex);
  state().used -= bytes;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock(state().mutex);
  *total = total_memory();
  *free = *total - state().used;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return posix_memalign(pointer, 4096, bytes ? bytes : 1) ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) { return free(pointer), cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* pointer) {
  memset(a, 0, sizeof *a);
  a->type = on_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char buffer[1 << 16];
  return *pointer = buffer, cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) { return copy(to, from, n, true); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, n, false);
}

// Memory of expandable segments: addresses are reserved once, physical memory comes and goes.
int cuMemAddressReserve(void** start, size_t bytes, size_t, void*, unsigned long long) {
  *start = reserve_addresses(bytes);
  return *start ? 0 : 2;
}
int cuMemAddressFree(void* start, size_t) { return release_addresses(start), 0; }
int cuMemGetAllocationGranularity(size_t* bytes, const void*, int) { return *bytes = 2 << 20, 0; }
int cuMemCreate(unsigned long long* handle, size_t bytes, const void*, unsigned long long) {
  count("cuMemCreate");
  if (!take_memory(bytes)) return 2;  // CUDA_ERROR_OUT_OF_MEMORY
  give_id(handle);
  Lock lock(state().mutex);
  state().handles[*handle] = bytes;
  return 0;
}
int cuMemRelease(unsigned long long handle) {
  wait("cuMemRelease");
  Lock lock(state().mutex);
  state().used -= state().handles[handle];
  state().handles.erase(handle);
  return 0;
}

// Streams, events and waiting.
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return give_id(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return give_id(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  if (id) *id = 0;
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return give_id(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return give_id(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) { return *milliseconds = 1, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait("cudaStreamSynchronize"), cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"), cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait("cudaEventSynchronize"), cudaSuccess; }

// Kernels. Compiled code registers each with the address of its host function.
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch(kernel), cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) {
  return launch(kernel), cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* kernel) {
  return *out = reinterpret_cast<cudaKernel_t>(const_cast<void*>(kernel)), cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launch(kernel), cudaSuccess;
}
int cuLaunchKernel() { return launch(nullptr), 0; }
int cuLaunchKernelEx() { return launch(nullptr), 0; }
void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  Lock lock(state().mutex);
  state().kernel_names[host] = name;
}
struct LaunchConfiguration {
  dim3 grid, block;
  size_t shared_memory;
  void* stream;
};
static thread_local LaunchConfiguration pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, void* stream) {
  pushed = {grid, block, shared_memory, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_memory = pushed.shared_memory;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}

// cuBLAS: handles and descriptors are memory that nobody reads.
static int give_object(void** out) { return *out = calloc(1, 4096), 0; }
static int product() { return count("matrix product"), 0; }
int cublasCreate_v2(void** out) { return give_object(out); }
int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
int cublasGemmEx() { return product(); }
int cublasGemmStridedBatchedEx() { return product(); }
int cublasSgemm_v2() { return product(); }
int cublasSgemmEx() { return product(); }
int cublasSgemmStridedBatched() { return product(); }
int cublasLtMatmul() { return product(); }
int cublasLtMatmulDescCreate(void** out) { return give_object(out); }
int cublasLtMatrixLayoutCreate(void** out) { return give_object(out); }
int cublasLtMatmulPreferenceCreate(void** out) { return give_object(out); }
int cublasLtMatmulDescDestroy(void* object) { return free(object), 0; }
int cublasLtMatrixLayoutDestroy(void* object) { return free(object), 0; }
int cublasLtMatmulPreferenceDestroy(void* object) { return free(object), 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* found) {
  memset(result, 0, 128);  // at least the size of cublasLtMatmulHeuristicResult_t
  return *found = 1, 0;
}

// Driver and NVML, which torch opens at run time.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  void* own = dlsym(RTLD_DEFAULT, name);
  *function = own ? own : reinterpret_cast<void*>(&zero);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
int cuCtxGetCurrent(void** context) { return *context = reinterpret_cast<void*>(0x10), 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
int cuGetErrorString(int, const char** text) { return *text = "error of the pretended GPU", 0; }
int cuModuleGetFunction(void** function, void*, const char*) { return *function = reinterpret_cast<void*>(0x20), 0; }
int cuModuleLoadData(void** module) { return *module = reinterpret_cast<void*>(0x30), 0; }
int cuModuleLoadDataEx(void** module) { return *module = reinterpret_cast<void*>(0x30), 0; }
int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) { return *device = reinterpret_cast<void*>(0x10), 0; }
int nvmlDeviceGetGpuFabricInfoV() { return 3; }  // NVML_ERROR_NOT_SUPPORTED
int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* n, void*) { return *n = 0, 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { return *version = kDriverVersion, 0; }
int nvmlDeviceGetNvLinkRemoteDeviceType() { return 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2() { return 3; }
}
