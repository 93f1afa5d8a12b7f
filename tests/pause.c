/* The first process of a pod: it waits, and ends when it is told to. */
#include <signal.h>
#include <unistd.h>

static void end(int number) { (void)number; _exit(0); }

int main(void) {
    signal(SIGTERM, end);
    signal(SIGINT, end);
    signal(SIGCHLD, SIG_IGN);
    for (;;) pause();
}
