#ifndef BLOCK_GATE_H
#define BLOCK_GATE_H
/*
 * Between a disk's door and its image: what testers ask for. Faults, delays, limits, the error policy, and the
 * log of writes. A disk that asks for none of it has no gate.
 *
 * Every request that entered ends by end(), once; in between pass() hands it to the image, perhaps more
 * than once (a retry), perhaps never (a fault).
 */
#include <stdbool.h>
struct blk_req;
struct error;
struct facts;
struct gate;
struct loop;
struct opts;

struct gate_door {
	const char *name;                               /* of the image, for messages; outlives the gate */
	void (*pass)(struct blk_req *r);                /* do it; gate_leave() when done, at once or later */
	void (*end)(struct blk_req *r, int err);        /* tell the requester */
};

/*
 * Main thread. The keys fault=, seed=, timeout=, delay=, iops= … bps_wr_max=, werror=, rerror=, log= of a disk; *ret is
 * NULL where none is used. Opens the log. 0 or -errno with words that name the option.
 */
int  gate_new(struct gate **ret, struct opts *o, const struct gate_door *door, struct error *err);
void gate_free(struct gate *g);                         /* drained; NULL is fine */
void gate_set_home(struct gate *g, struct loop *home);
/* hold(arg, true): a request waits for the host, the machine is to stop; hold(arg, false): it may go on. Home loop. */
void gate_set_hold(struct gate *g, void (*hold)(void *arg, bool on), void *arg);
void gate_describe(struct gate *g, struct facts *f);

/* Home loop. Requests are checked and lie within the disk. */
void gate_enter(struct gate *g, struct blk_req *r);
/* The image is done with it. durable: a write that is on the medium (write-through). */
void gate_leave(struct gate *g, struct blk_req *r, int err, bool durable);
/*
 * For a drain: what is held back goes to the image at once, what waits for a timeout or for a retry ends with its
 * error. gate_drained() when nothing is in flight any more: the log is complete then.
 */
void gate_drain(struct gate *g);
void gate_drained(struct gate *g);
#endif
