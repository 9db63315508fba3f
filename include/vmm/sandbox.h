#ifndef VMM_SANDBOX_H
#define VMM_SANDBOX_H
/*
 * What the VM process may still do once everything is open and before the guest's first instruction.
 * docs/threat-model.md says what each step is for.
 *
 *	sandbox_prepare()       main, before there are other threads
 *	sandbox_thread()        every thread of a vCPU or loop, once it is set up
 *	sandbox_enter()         main, when all of them are: confines itself, filters the calls of all
 */
struct error;
struct vm;

/* SANDBOX_LOG: as on, but a call that would kill is let through and reported by the kernel's audit log. */
enum sandbox_mode { SANDBOX_OFF, SANDBOX_ON, SANDBOX_LOG };

/*
 * Makes ready what the threads need to confine themselves; SANDBOX_OFF: they and sandbox_enter() do nothing.
 * Main thread, the only one of the process. 0 or -errno with words.
 */
int sandbox_prepare(enum sandbox_mode mode, struct error *err);

/*
 * The calling thread, and those it will start, lose their identity where it is root's, their capabilities and
 * all access to the file system; open descriptors are not touched. A failure is kept for sandbox_enter().
 * Any thread but main, once, before it reports that it is up.
 */
void sandbox_thread(void);

/*
 * Main thread, after vm_create(), before vm_start(): the same for this thread, then a system-call filter over
 * all threads that kills the process. 0 or -errno with words.
 */
int sandbox_enter(struct vm *vm, struct error *err);

/*
 * The same for a process that reads images for a tool and has everything open that it needs: it keeps its
 * descriptors and can lock, read, write and size them, make threads, and exchange messages on sockets it has. The only
 * thread of the process. 0 or -errno with words.
 */
int sandbox_tool(enum sandbox_mode mode, struct error *err);
#endif
