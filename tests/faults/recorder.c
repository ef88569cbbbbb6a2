/* Record what a process does to the files below a folder, for the power-loss test. Use: LD_PRELOAD, with

     RECORDER_ROOT   the folder whose files are recorded
     RECORDER_LOG    where to append the records (outside that folder)

   A record is   u8 kind, 3 bytes of nothing, u32 path bytes, u64 number, u64 data bytes, path, data   little endian.

     C path           a file was created                 T path number    its length was set
     W path number    data was written at an offset      S path           it was synced (logged once that is over)
     L path data      it got a second name, data         R path data      it was renamed to data
     U path           its name was removed               D path           the folder was synced
     M data           the application says something, by bf_mark

   The log is written by one system call a record, after the real call, so its order is the order of what happened in
   each thread. Memory maps are not seen: SQLite writes its -shm that way, which a power loss empties anyway. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define FDS 4096

static char *path_of[FDS]; /* of descriptors that are recorded; set by open, before anybody can use the descriptor */
static char is_folder[FDS];
static char root[PATH_MAX];
static int log_fd = -1;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static void record(char kind, const char *path, uint64_t number, const void *data, uint64_t bytes) {
  struct __attribute__((packed)) { char kind, pad[3]; uint32_t path_bytes; uint64_t number, bytes; } head;
  if (log_fd < 0) return;
  int saved = errno;
  memset(&head, 0, sizeof head);
  head.kind = kind;
  head.path_bytes = (uint32_t)strlen(path);
  head.number = number;
  head.bytes = bytes;
  struct iovec parts[3] = {{&head, sizeof head}, {(void *)path, head.path_bytes}, {(void *)data, bytes}};
  if (syscall(SYS_writev, log_fd, parts, 3) != (ssize_t)(sizeof head + head.path_bytes + bytes)) abort();
  errno = saved;
}

__attribute__((constructor)) static void begin(void) {
  const char *folder = getenv("RECORDER_ROOT"), *log = getenv("RECORDER_LOG");
  if (!folder || !log || !realpath(folder, root)) return;
  log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (log_fd < 0) abort();
  int high = fcntl(log_fd, F_DUPFD_CLOEXEC, 500); /* out of the way of those who close what they do not know */
  if (high >= 0) { close(log_fd); log_fd = high; }
}

void bf_mark(const char *text, size_t bytes) { record('M', "", 0, text, bytes); }

static int below_root(const char *path, char *full) {
  if (log_fd < 0 || path[0] != '/' || strlen(path) >= PATH_MAX) return 0;
  strcpy(full, path);
  size_t length = strlen(root);
  return strncmp(full, root, length) == 0 && (full[length] == '/' || full[length] == 0);
}

static int opened(int fd, const char *path, int flags, int was_there) {
  char full[PATH_MAX];
  struct stat found;
  if (fd < 0 || !below_root(path, full)) return fd;
  if (fd >= FDS) abort();
  path_of[fd] = strdup(full);
  is_folder[fd] = fstat(fd, &found) == 0 && S_ISDIR(found.st_mode);
  if (!was_there) record('C', full, 0, 0, 0);
  else if (flags & O_TRUNC) record('T', full, 0, 0, 0);
  return fd;
}

#define OPEN(name)                                                                                                     \
  int name(const char *path, int flags, ...) {                                                                         \
    va_list more;                                                                                                      \
    va_start(more, flags);                                                                                             \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(more, mode_t) : 0;                                          \
    va_end(more);                                                                                                      \
    int was_there = !(flags & O_CREAT) || access(path, F_OK) == 0;                                                     \
    return opened(REAL(name)(path, flags, mode), path, flags, was_there);                                              \
  }
OPEN(open)
OPEN(open64)

int close(int fd) {
  if (fd >= 0 && fd < FDS && path_of[fd]) {
    free(path_of[fd]);
    path_of[fd] = 0;
  }
  return REAL(close)(fd);
}

static const char *recorded(int fd) { return fd >= 0 && fd < FDS ? path_of[fd] : 0; }

#define PWRITE(name, offset_t)                                                                                         \
  ssize_t name(int fd, const void *data, size_t bytes, offset_t at) {                                                  \
    ssize_t done = REAL(name)(fd, data, bytes, at);                                                                    \
    if (done > 0 && recorded(fd)) record('W', recorded(fd), (uint64_t)at, data, (uint64_t)done);                       \
    return done;                                                                                                       \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t bytes) {
  const char *path = recorded(fd);
  off_t at = path ? lseek(fd, 0, fcntl(fd, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR) : 0;
  ssize_t done = REAL(write)(fd, data, bytes);
  if (path && done > 0) record('W', path, (uint64_t)at, data, (uint64_t)done);
  return done;
}

#define TRUNCATE(name, offset_t)                                                                                       \
  int name(int fd, offset_t length) {                                                                                  \
    int failed = REAL(name)(fd, length);                                                                               \
    if (!failed && recorded(fd)) record('T', recorded(fd), (uint64_t)length, 0, 0);                                    \
    return failed;                                                                                                     \
  }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                                                                                                     \
  int name(int fd) {                                                                                                   \
    int failed = REAL(name)(fd);                                                                                       \
    if (!failed && recorded(fd)) record(is_folder[fd] ? 'D' : 'S', recorded(fd), 0, 0, 0);                             \
    return failed;                                                                                                     \
  }
SYNC(fsync)
SYNC(fdatasync)

int link(const char *old, const char *new) {
  char full[PATH_MAX];
  int failed = REAL(link)(old, new);
  if (!failed && below_root(new, full)) record('L', old, 0, new, strlen(new));
  return failed;
}

int rename(const char *old, const char *new) {
  char full[PATH_MAX];
  int failed = REAL(rename)(old, new);
  if (!failed && below_root(new, full)) record('R', old, 0, new, strlen(new));
  return failed;
}

int unlink(const char *path) {
  char full[PATH_MAX];
  int failed = REAL(unlink)(path);
  if (!failed && below_root(path, full)) record('U', full, 0, 0, 0);
  return failed;
}
