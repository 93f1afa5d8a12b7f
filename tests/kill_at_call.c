/* Preloaded: a process dies by SIGKILL before its KILL_N-th call of KILL_CALL, and leaves the file KILL_MARK. strace can do so too, and makes each call dear. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static int made;

static void die_at(const char *call) {
    const char *wanted = getenv("KILL_CALL"), *n = getenv("KILL_N"), *mark = getenv("KILL_MARK");
    if (!wanted || !n || !mark || strcmp(wanted, call) || __atomic_add_fetch(&made, 1, __ATOMIC_SEQ_CST) != atoi(n)) return;
    open(mark, O_CREAT | O_WRONLY, 0600);
    kill(getpid(), SIGKILL);
}

#define WRAPPED(result, name, parameters, ...) \
    result name parameters { \
        static result (*real) parameters; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        die_at(#name); \
        return real(__VA_ARGS__); \
    }

WRAPPED(ssize_t, write, (int file, const void *data, size_t size), file, data, size)
WRAPPED(ssize_t, send, (int socket, const void *data, size_t size, int flags), socket, data, size, flags)
WRAPPED(int, connect, (int socket, const struct sockaddr *address, socklen_t size), socket, address, size)
WRAPPED(int, fsync, (int file), file)
WRAPPED(int, rename, (const char *from, const char *to), from, to)
WRAPPED(int, mkdir, (const char *path, mode_t mode), path, mode)
WRAPPED(int, unlink, (const char *path), path)
