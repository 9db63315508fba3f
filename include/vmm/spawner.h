#ifndef VMM_SPAWNER_H
#define VMM_SPAWNER_H
/*
 * The one process that can start programs once the VM process is shut in. It is forked while vmm still has
 * one thread and no guest RAM, knows only the commands registered before it was sealed, and ends when the
 * VM process ends, however that happened. Main thread, except spawner_run().
 */
#include <stddef.h>
#include <sys/types.h>
struct error;
struct spawner;

#define SPAWNER_COMMANDS 16     /* most commands of one spawner */
#define SPAWNER_FDS      8      /* most descriptors handed to one program */

int  spawner_new(struct spawner **ret, struct error *err);
/*
 * Register a command (argv is copied, argv[0] is the path) before spawner_seal(); returns its number. It
 * will run with stdin and stdout on /dev/null, vmm's stderr, default signals and a minimal environment.
 */
int  spawner_add(struct spawner *s, const char *const *argv, struct error *err);
/* Number of the first command whose program has this file name, or -ENOENT. */
int  spawner_find(const struct spawner *s, const char *name);
int  spawner_seal(struct spawner *s, struct error *err);        /* forks; nothing registered: nothing is forked */
/*
 * Start command n with fds as its descriptors 3, 4, …; returns a pidfd (readable when it ended) or -errno,
 * which may be that of exec. Waits for the exec: about a millisecond. Any thread but a loop's.
 */
int  spawner_run(struct spawner *s, unsigned n, const int *fds, unsigned nr_fds);
void spawner_free(struct spawner *s);   /* its children are gone, and it is reaped, on return; NULL is fine */

/* Path of a helper program: beside the vmm binary (a build tree), in ../libexec/vmm from it, else where it was installed. 0 or -ENOENT. */
int  helper_path(const char *name, char *buf, size_t len);
#endif
