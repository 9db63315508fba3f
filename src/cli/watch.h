#ifndef CLI_WATCH_H
#define CLI_WATCH_H
/*
 * The main thread while the guest runs: signals, the timeout, requests of other threads, and the check for
 * a guest that can never wake. Returns once vm->stop is set and the vCPUs are parked.
 */
struct error;
struct vm;

/* Block the signals watched for; call before any thread is made. Returns a signalfd, or -errno. */
int watch_signals(struct error *err);
int watch_vm(struct vm *vm, int signal_fd, struct error *err);
#endif
