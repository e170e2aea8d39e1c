/* A FAKE libnvidia-ml.so.1 for tests. It knows no hardware: it answers from the file that $FAKE_NVML_CONFIG names,
 * written by Machine.toml() in machine.py, where the keys are described. fake.py is the same in Python.
 *
 * Structures and function names are those of NVIDIA's public nvml.h; nothing else of NVIDIA's is used.
 *
 * $FAKE_NVML_HELD: a folder of files UUID.PID, whose numbers are bytes that these processes hold for as long as they live.
 *
 *   cc -shared -fPIC -fvisibility=hidden -Wl,-soname,libnvidia-ml.so.1 -o libnvidia-ml.so.1 fakenvml.c
 */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    ARGUMENT_VERSION_MISMATCH = 25,
};
enum { MAX_TABLES = 128, MAX_KEYS = 32, P2P_NOT_SUPPORTED = 5, TYPE_GPU = 0, TYPE_SWITCH = 2, MEMORY_V2 = 0x02000028 };

typedef unsigned long long u64;
typedef struct { char key[64], value[96]; } Entry;
typedef struct { char kind; int number, n_entries; Entry entries[MAX_KEYS]; } Table; /* kind: s(ystem) f(ail) g(pu) m(ig) l(ink) */
typedef Table *Device;

typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } Memory_v2;
typedef struct { char busIdLegacy[16]; unsigned domain, bus, device, deviceId, subSystemId; char busId[32]; } PciInfo;
typedef struct { unsigned pid; u64 usedGpuMemory; unsigned gpuInstance, computeInstance; } ProcessInfo;
_Static_assert(sizeof(Memory) == 24 && sizeof(Memory_v2) == 40, "nvml.h");
_Static_assert(sizeof(PciInfo) == 68 && sizeof(ProcessInfo) == 24, "nvml.h");

static Table tables[MAX_TABLES];
static int n_tables, n_gpus, opened;

/* --- the description ------------------------------------------------------------------------------------------- */

static void add_entry(Table *table, const char *line) {
    Entry *entry = &table->entries[table->n_entries];
    if (table->n_entries == MAX_KEYS) return;
    if (sscanf(line, "%63s = \"%95[^\"]\"", entry->key, entry->value) == 2 ||
        sscanf(line, "%63s = %95s", entry->key, entry->value) == 2)
        table->n_entries++;
}

static int read_description(void) {
    const char *path = getenv("FAKE_NVML_CONFIG");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256];
    if (!file) return DRIVER_NOT_LOADED;
    n_tables = n_gpus = 0;
    while (fgets(line, sizeof line, file)) {
        if (line[0] != '[') {
            if (n_tables) add_entry(&tables[n_tables - 1], line);
        } else if (n_tables < MAX_TABLES) {
            Table *table = &tables[n_tables++];
            memset(table, 0, sizeof *table);
            table->kind = line[1] == '[' ? line[2] : line[1];
            if (table->kind == 'g') table->number = n_gpus++;
        }
    }
    fclose(file);
    return SUCCESS;
}

static const char *find(const Table *table, const char *key) {
    for (int i = 0; table && i < table->n_entries; i++)
        if (!strcmp(table->entries[i].key, key)) return table->entries[i].value;
    return NULL;
}

static Table *next(char kind, Table *after) {
    for (Table *table = after ? after + 1 : tables; table < tables + n_tables; table++)
        if (table->kind == kind) return table;
    return NULL;
}

static u64 number_or(const Table *table, const char *key, u64 otherwise) {
    const char *value = find(table, key);
    return value ? strtoull(value, NULL, 0) : otherwise;
}

static int number(const Table *table, const char *key, u64 *out) {
    const char *value = find(table, key);
    if (!value) return NOT_SUPPORTED;
    if (value[0] == '!') return atoi(value + 1);
    *out = strtoull(value, NULL, 0);
    return SUCCESS;
}

static int small_number(const Table *table, const char *key, unsigned *out) {
    u64 value = 0;
    int code = number(table, key, &value);
    if (code == SUCCESS) *out = (unsigned)value;
    return code;
}

static int text(const Table *table, const char *key, char *out, unsigned length) {
    const char *value = find(table, key);
    if (!value) return NOT_SUPPORTED;
    if (value[0] == '!') return atoi(value + 1);
    if (strlen(value) >= length) return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return SUCCESS;
}

/* What stands before every answer: a code from [fail], or the state of the library. */
static int refusal(const char *function) {
    const char *code = find(next('f', NULL), function);
    if (code) return atoi(code);
    return opened ? SUCCESS : UNINITIALIZED;
}
#define CHECK() do { int code_ = refusal(__func__); if (code_ != SUCCESS) return code_; } while (0)

/* --- library and system ---------------------------------------------------------------------------------------- */

EXPORT int nvmlInitWithFlags(unsigned flags) {
    int code = read_description();
    (void)flags;
    if (code == SUCCESS) code = (int)number_or(next('s', NULL), "init_error", 0);
    if (code == SUCCESS) opened++;
    return code;
}

EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

EXPORT int nvmlShutdown(void) {
    CHECK();
    opened--;
    return SUCCESS;
}

EXPORT const char *nvmlErrorString(int code) {
    static char words[32];
    snprintf(words, sizeof words, "fake NVML code %d", code);
    return words;
}

EXPORT int nvmlSystemGetDriverVersion(char *out, unsigned length) {
    CHECK();
    return text(next('s', NULL), "driver_version", out, length);
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *out) {
    CHECK();
    return small_number(next('s', NULL), "cuda_driver_version", (unsigned *)out);
}

/* --- cards ----------------------------------------------------------------------------------------------------- */

static Device gpu(int wanted) {
    Device device = next('g', NULL);
    while (device && device->number != wanted) device = next('g', device);
    return device;
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *out) {
    CHECK();
    *out = (unsigned)n_gpus;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *out) {
    CHECK();
    *out = gpu((int)index);
    return *out ? (int)number_or(*out, "handle_error", SUCCESS) : INVALID_ARGUMENT;
}

static int handle_by(const char *key, const char *wanted, Device *out) {
    for (Table *table = tables; table < tables + n_tables; table++) {
        const char *name = find(table, key);
        if (strchr("gm", table->kind) && name && !strcmp(name, wanted)) {
            *out = table;
            return (int)number_or(table, "handle_error", SUCCESS);
        }
    }
    return NOT_FOUND;
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, Device *out) {
    CHECK();
    return handle_by("uuid", uuid, out);
}

EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, Device *out) {
    CHECK();
    return handle_by("pci_bus_id", bus_id, out);
}

#define TEXT(function, key) \
    EXPORT int function(Device device, char *out, unsigned length) { CHECK(); return text(device, key, out, length); }
#define NUMBER(function, key) \
    EXPORT int function(Device device, unsigned *out) { CHECK(); return small_number(device, key, out); }

TEXT(nvmlDeviceGetName, "name")
TEXT(nvmlDeviceGetUUID, "uuid")
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, "pcie_gen")
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, "pcie_width")
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, "pcie_gen_max")
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, "pcie_width_max")
NUMBER(nvmlDeviceGetGpuMaxPcieLinkGeneration, "pcie_gen_card")
NUMBER(nvmlDeviceGetEnforcedPowerLimit, "power_limit_mw")
NUMBER(nvmlDeviceGetMemoryBusWidth, "mem_bus_width")
NUMBER(nvmlDeviceGetDisplayActive, "display_active")
NUMBER(nvmlDeviceGetMaxMigDeviceCount, "mig_max")

EXPORT int nvmlDeviceGetMaxClockInfo(Device device, int kind, unsigned *out) {
    CHECK();
    return kind == 2 ? small_number(device, "mem_clock_max_mhz", out) : NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetCudaComputeCapability(Device device, int *major, int *minor) {
    unsigned both = 0;
    CHECK();
    int code = small_number(device, "compute_capability", &both);
    *major = (int)both / 10;
    *minor = (int)both % 10;
    return code;
}

/* Bytes held on a card by processes that live; the first `room` of them are written to `out`, *count is how many. */
static u64 held(Device device, ProcessInfo *out, unsigned room, unsigned *count) {
    const char *path = getenv("FAKE_NVML_HELD"), *uuid = find(device, "uuid");
    DIR *folder = path && uuid ? opendir(path) : NULL;
    const size_t length = uuid ? strlen(uuid) : 0;
    u64 sum = 0;
    *count = 0;
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        char name[512];
        u64 bytes = 0;
        if (strncmp(entry->d_name, uuid, length) || entry->d_name[length] != '.') continue;
        const int pid = atoi(entry->d_name + length + 1);
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        FILE *file = pid > 0 && !kill(pid, 0) ? fopen(name, "r") : NULL;
        if (!file) continue;
        if (fscanf(file, "%llu", &bytes) == 1) {
            if (*count < room) out[*count] = (ProcessInfo){(unsigned)pid, bytes, ~0u, ~0u};
            ++*count;
            sum += bytes;
        }
        fclose(file);
    }
    if (folder) closedir(folder);
    return sum;
}

static u64 used(Device device) {
    unsigned count;
    return number_or(device, "mem_used", 0) + held(device, NULL, 0, &count);
}

EXPORT int nvmlDeviceGetMemoryInfo(Device device, Memory *out) {
    CHECK();
    int code = number(device, "mem_total", &out->total);
    out->used = used(device) + number_or(device, "mem_reserved", 0);
    out->free = out->total - out->used;
    return code;
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(Device device, Memory_v2 *out) {
    CHECK();
    if (out->version != MEMORY_V2) return ARGUMENT_VERSION_MISMATCH;
    int code = number(device, "mem_total", &out->total);
    out->used = used(device);
    out->reserved = number_or(device, "mem_reserved", 0);
    out->free = out->total - out->used - out->reserved;
    return code;
}

static int fill_pci(const char *bus_id, PciInfo *out) {
    unsigned function = 0;
    memset(out, 0, sizeof *out);
    if (!bus_id) return NOT_SUPPORTED;
    if (sscanf(bus_id, "%x:%x:%x.%u", &out->domain, &out->bus, &out->device, &function) != 4) return INVALID_ARGUMENT;
    snprintf(out->busId, sizeof out->busId, "%s", bus_id);
    snprintf(out->busIdLegacy, sizeof out->busIdLegacy, "%.12s", bus_id + 4);
    return SUCCESS;
}

EXPORT int nvmlDeviceGetPciInfo_v3(Device device, PciInfo *out) {
    CHECK();
    return fill_pci(find(device, "pci_bus_id"), out);
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned *count, ProcessInfo *out) {
    CHECK();
    const unsigned room = *count;
    const unsigned own = find(device, "proc_pid") ? 1 : 0;
    (void)held(device, out ? out + own : NULL, out && room > own ? room - own : 0, count);
    *count += own;
    if (room < *count || (*count && !out)) return INSUFFICIENT_SIZE;
    if (own) *out = (ProcessInfo){(unsigned)number_or(device, "proc_pid", 0), number_or(device, "proc_mem", ~0ull), ~0u, ~0u};
    return SUCCESS;
}

/* --- links ----------------------------------------------------------------------------------------------------- */

static int other_end(const Table *link, int me) {
    int a = (int)number_or(link, "a", 0), b = (int)number_or(link, "b", 0);
    return a == me ? b : b == me ? a : -1;
}

/* NVLinks of a card are numbered: those to switches, then pair by pair. *peer is NULL for a switch. */
static int nvlink(Device device, unsigned wanted, Device *peer) {
    unsigned seen = (unsigned)number_or(device, "switch_links", 0);
    *peer = NULL;
    if (wanted < seen) return SUCCESS;
    for (Table *link = next('l', NULL); link; link = next('l', link)) {
        int other = other_end(link, device->number);
        if (other < 0) continue;
        seen += (unsigned)number_or(link, "nvlinks", 0);
        if (wanted < seen) {
            *peer = gpu(other);
            return SUCCESS;
        }
    }
    return seen ? INVALID_ARGUMENT : NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetNvLinkState(Device device, unsigned link, unsigned *out) {
    Device peer;
    CHECK();
    *out = link >= number_or(device, "idle_links", 0);
    return *out ? nvlink(device, link, &peer) : SUCCESS;
}

EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType(Device device, unsigned link, int *out) {
    Device peer;
    CHECK();
    int code = nvlink(device, link, &peer);
    *out = peer ? TYPE_GPU : TYPE_SWITCH;
    return code;
}

EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(Device device, unsigned link, PciInfo *out) {
    Device peer;
    CHECK();
    int code = nvlink(device, link, &peer);
    return code ? code : fill_pci(peer ? find(peer, "pci_bus_id") : "00000000:C1:00.0", out);
}

EXPORT int nvmlDeviceGetP2PStatus(Device a, Device b, int index, int *out) {
    CHECK();
    Table *link = next('l', NULL);
    while (link && other_end(link, a->number) != b->number) link = next('l', link);
    int linked = number_or(link, "nvlinks", 0) ? SUCCESS : P2P_NOT_SUPPORTED;
    *out = index == 2 ? (int)number_or(link, "p2p_nvlink", (u64)linked) : (int)number_or(link, "p2p", P2P_NOT_SUPPORTED);
    return SUCCESS;
}

EXPORT int nvmlDeviceGetTopologyCommonAncestor(Device a, Device b, unsigned *out) {
    CHECK();
    Table *link = next('l', NULL);
    while (link && other_end(link, a->number) != b->number) link = next('l', link);
    return small_number(link, "level", out);
}

/* --- MIG ------------------------------------------------------------------------------------------------------- */

EXPORT int nvmlDeviceGetMigMode(Device device, unsigned *current, unsigned *pending) {
    CHECK();
    int code = small_number(device, "mig_mode", current);
    *pending = *current;
    return code;
}

EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(Device device, unsigned slot, Device *out) {
    CHECK();
    for (Table *mig = next('m', NULL); mig; mig = next('m', mig))
        if ((int)number_or(mig, "gpu", 0) == device->number && number_or(mig, "slot", 0) == slot) {
            *out = mig;
            return SUCCESS;
        }
    return NOT_FOUND;
}
