/* Makes fsync and fdatasync fail or take long, for files under one folder. Loaded by LD_PRELOAD.

   SHIM_CONTROL names a file that is read before every sync: its text is nothing (let it pass), "eio" (fail), or
   "sleep N" (take N milliseconds). SHIM_FOLDER is the folder; in it, paths through a folder "bad" are meant. Each sync that failed adds an "f" to SHIM_CONTROL.log, and
   each one tried after that an "r". */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int is_meant(int fd) {
    const char *folder = getenv("SHIM_FOLDER");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0 || folder == NULL) return 0;
    path[n] = 0;
    return strncmp(path, folder, strlen(folder)) == 0 && strstr(path + strlen(folder), "/bad/") != NULL;
}

static void note(const char *control, char what) {
    char path[4096];
    snprintf(path, sizeof path, "%s.log", control);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd >= 0) {
        if (write(fd, &what, 1) != 1) { /* the test will notice */ }
        close(fd);
    }
}

/* Returns whether this sync is to fail. */
static int interfere(int fd) {
    const char *control = getenv("SHIM_CONTROL");
    char text[64] = "", path[4096];
    long ms;
    if (control == NULL || !is_meant(fd)) return 0;
    int file = open(control, O_RDONLY);
    if (file >= 0) {
        ssize_t n = read(file, text, sizeof text - 1);
        text[n > 0 ? n : 0] = 0;
        close(file);
    }
    if (sscanf(text, "sleep %ld", &ms) == 1) {
        struct timespec wait = {ms / 1000, ms % 1000 * 1000000};
        nanosleep(&wait, NULL);
    }
    if (strncmp(text, "eio", 3) != 0) return 0;
    snprintf(path, sizeof path, "%s.log", control);
    note(control, access(path, F_OK) == 0 ? 'r' : 'f');
    return 1;
}

static int pass(const char *name, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    if (interfere(fd)) {
        errno = EIO;
        return -1;
    }
    return real(fd);
}

int fsync(int fd) { return pass("fsync", fd); }
int fdatasync(int fd) { return pass("fdatasync", fd); }
