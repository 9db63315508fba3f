/*
 * How this works
 *
 * The thread runs turn after turn:
 *
 *	reap        completions: done() of finished operations; descriptors and events are only marked
 *	tell        fn() of marked descriptors and events, posted tasks, due timers, look() of polled rings
 *	turn end    loop_at_turn_end() tasks: publish, interrupt
 *	hand over   if anything is left to do: submit without sleeping. Otherwise look around for up to
 *	            budget ns (polled rings, completions, posts; no system call with io_uring), and then
 *	            arm the polled rings and sleep in the same call that submits.
 *
 * No lost wakeup: a poster puts its task on the stack and then looks at sleeping; the loop sets sleeping
 * and then looks at the stack (both sequentially consistent). Whoever clears sleeping writes the eventfd,
 * so a burst of posts costs one write.
 *
 * The budget grows when something arrived within poll_max of having nothing to do (looking a little longer
 * would have seen it) and is halved when looking for poll_max would have been fruitless: an idle loop sleeps
 * at once and wakes for nothing, and so does one whose disk takes longer than that. A sleep says too little
 * about the guest, though: one that would answer in 2 us must ring first, and that and the waking take longer
 * than poll_max on some hosts. So after some long sleeps a short look is tried all the same.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include "loop_priv.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/sandbox.h"

#define BUDGET_FIRST 4000               /* ns; growth starts here, or at an eighth of the maximum */
#define BUDGET_LEAST 1000               /* less is not worth the clock reads */
#define PROBE_EVERY  8                  /* long sleeps */
#define LOOKS        16                 /* between two of them: the clock takes longer than a look */

static _Thread_local struct loop *here;

bool loop_here(const struct loop *l)
{
	return here == l;
}

/* --- lists of operations --- */

void op_list_add(struct op_list *list, struct loop_op *op)
{
	op->next = NULL;
	if (list->head)
		list->tail->next = op;
	else
		list->head = op;
	list->tail = op;
}

struct loop_op *op_list_take(struct op_list *list)
{
	struct loop_op *op = list->head;

	if (op)
		list->head = op->next;
	return op;
}

bool op_list_remove(struct op_list *list, struct loop_op *op)
{
	struct loop_op *prev = NULL, *o;

	for (o = list->head; o && o != op; o = o->next)
		prev = o;
	if (!o)
		return false;
	if (prev)
		prev->next = op->next;
	else
		list->head = op->next;
	if (list->tail == op)
		list->tail = prev;
	return true;
}

void op_complete(struct loop *l, struct loop_op *op, int res)
{
	op_set_state(op, OP_FINISHED);
	op->res = res;
	op_list_add(&l->done, op);
}

/* --- operations; home loop --- */

void loop_submit(struct loop *l, struct loop_op *op)
{
	ON_LOOP(l);
	assert(op_state(op) == OP_IDLE);
	op->state = OP_QUEUED;
	if (op->kind == OP_WORK)
		pool_submit(l, op);
	else if (op->quick)
		op_list_add(&l->quick, op);
	else
		l->ops->submit(l, op);
}

void loop_cancel(struct loop *l, struct loop_op *op)
{
	ON_LOOP(l);
	if (op_state(op) == OP_IDLE || op_state(op) == OP_FINISHED || (op->state & OP_CANCELLED))
		return;
	op->state |= OP_CANCELLED;
	if (op_list_remove(&l->quick, op) || (op_state(op) == OP_POOLED && pool_cancel(l, op)))
		op_complete(l, op, -ECANCELED);
	else if (op_state(op) != OP_POOLED)
		l->ops->cancel(l, op);
}

bool loop_file_quick(int fd)
{
	struct statfs fs;
	struct stat st;

	/* A FIFO or a device node lies on a file system too. */
	return !fstat(fd, &st) && S_ISREG(st.st_mode) && !fstatfs(fd, &fs) &&
		(fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
}

static void finish_op(struct loop_op *op, int res)
{
	op->state = OP_IDLE;
	op->done(op, res);
}

/* Everything the workers finished, oldest first, to the end of the list of completions. */
static void collect_finished(struct loop *l)
{
	struct loop_op *op, *next, *fifo = NULL;

	if (!atomic_load_explicit(&l->pool.finished, memory_order_relaxed))
		return;
	for (op = atomic_exchange(&l->pool.finished, NULL); op; op = next) {
		next = op->next;
		op->next = fifo;
		fifo = op;
	}
	for (op = fifo; op; op = next) {
		next = op->next;
		op_complete(l, op, op->res);
	}
}

/* Operations that are complete by now; what they complete in turn waits for the next reaping. */
static void reap(struct loop *l)
{
	struct loop_op *op;
	unsigned n = 0;

	l->ops->reap(l);
	collect_finished(l);
	for (op = l->done.head; op; op = op->next)
		n++;
	while (n-- && (op = op_list_take(&l->done)))
		finish_op(op, op->res);
}

static void prepare(struct loop *l)
{
	struct loop_op *op;

	while ((op = op_list_take(&l->quick)))
		op_complete(l, op, op_run(op));
	l->ops->prepare(l);
}

/* --- descriptors and events; home loop --- */

void watch_ready(struct loop *l, struct watch *w, uint32_t bits)
{
	w->ready |= bits;
	if (w->listed)
		return;
	w->listed = true;
	w->next_ready = NULL;
	*l->ready_tail = w;
	l->ready_tail = &w->next_ready;
}

static struct watch *take_ready(struct loop *l)
{
	struct watch *w = l->ready;

	l->ready = w->next_ready;
	if (!l->ready)
		l->ready_tail = &l->ready;
	w->listed = false;
	return w;
}

static void unlist(struct loop *l, struct watch *w)
{
	struct watch **p;

	if (!w->listed)
		return;
	for (p = &l->ready; *p != w; p = &(*p)->next_ready)
		;
	*p = w->next_ready;
	if (!*p)
		l->ready_tail = p;
	w->listed = false;
}

static int add_watch(struct loop *l, const struct watch *from, void **engine)
{
	struct watch *w;

	ON_LOOP(l);
	if (fcntl(from->fd, F_GETFD) < 0)
		return -errno;
	w = malloc(sizeof(*w));
	if (!w)
		return -ENOMEM;
	*w = *from;
	w->next_all = l->watches;
	w->prev_all = &l->watches;
	if (w->next_all)
		w->next_all->prev_all = &w->next_all;
	l->watches = w;
	l->ops->watch(l, w);
	*engine = w;
	return 0;
}

static void del_watch(struct loop *l, void **engine)
{
	struct watch *w = *engine;

	ON_LOOP(l);
	if (!w)
		return;
	*engine = NULL;
	w->f = NULL;
	w->e = NULL;
	unlist(l, w);
	l->ops->unwatch(l, w);
}

void watch_free(struct watch *w)
{
	*w->prev_all = w->next_all;
	if (w->next_all)
		w->next_all->prev_all = w->prev_all;
	free(w);
}

int loop_add_fd(struct loop *l, struct loop_fd *f)
{
	return add_watch(l, &(struct watch){ .f = f, .fd = f->fd, .events = f->events }, &f->engine);
}

void loop_del_fd(struct loop *l, struct loop_fd *f)
{
	del_watch(l, &f->engine);
}

int loop_add_event(struct loop *l, struct loop_event *e)
{
	return add_watch(l, &(struct watch){ .e = e, .fd = e->fd, .events = EPOLLIN }, &e->engine);
}

void loop_del_event(struct loop *l, struct loop_event *e)
{
	del_watch(l, &e->engine);
}

/* Each that is marked now, once. fn may remove this one and any other. */
static void tell_ready(struct loop *l)
{
	struct watch *w;
	unsigned n = 0;

	for (w = l->ready; w; w = w->next_ready)
		n++;
	while (n-- && l->ready) {
		uint32_t bits;

		w = take_ready(l);
		bits = w->ready;
		w->ready = 0;
		l->ops->told(l, w);
		if (w->e)
			w->e->fn(w->e);
		else
			w->f->fn(w->f, bits);
	}
}

/* --- tasks --- */

void loop_wake(struct loop *l)
{
	uint64_t one = 1;

	/* EAGAIN would mean that the counter is full: it is readable all the same. */
	if (atomic_load(&l->sleeping) && atomic_exchange(&l->sleeping, false) &&
		write(l->wake_fd, &one, sizeof(one)) < 0)
		return;
}

static void woken(struct loop_event *e)
{
	(void)e;        /* being awake is all that was wanted */
}

void loop_post(struct loop *l, struct loop_task *t)
{
	if (atomic_exchange(&t->queued, true))
		return;
	t->next = atomic_load(&l->posted);
	while (!atomic_compare_exchange_weak(&l->posted, &t->next, t))
		;
	loop_wake(l);
}

static void run_task(struct loop_task *t)
{
	atomic_store(&t->queued, false);        /* from here on it may be asked for again */
	t->fn(t);
}

static void run_posted(struct loop *l)
{
	struct loop_task *t, *next, *fifo = NULL;

	if (!atomic_load_explicit(&l->posted, memory_order_relaxed))
		return;
	for (t = atomic_exchange(&l->posted, NULL); t; t = next) {
		next = t->next;
		t->next = fifo;
		fifo = t;
	}
	for (t = fifo; t; t = next) {
		next = t->next;
		run_task(t);
	}
}

struct call {
	struct loop_task task;
	void (*fn)(void *arg);
	void *arg;
	sem_t done;
};

static void run_call(struct loop_task *t)
{
	struct call *c = container_of(t, struct call, task);

	c->fn(c->arg);
	sem_post(&c->done);
}

void loop_call(struct loop *l, void (*fn)(void *arg), void *arg)
{
	struct call c = { .task = { .fn = run_call }, .fn = fn, .arg = arg };

	assert(!here);          /* waiting flows downhill only */
	sem_init(&c.done, 0, 0);
	loop_post(l, &c.task);
	while (sem_wait(&c.done))
		;               /* EINTR: a kick meant for later */
	sem_destroy(&c.done);
}

void loop_at_turn_end(struct loop *l, struct loop_task *t)
{
	ON_LOOP(l);
	if (atomic_exchange(&t->queued, true))
		return;
	t->next = NULL;
	*l->turn_end_tail = t;
	l->turn_end_tail = &t->next;
}

/* Those asked for by now; what they ask for belongs to the next turn, which follows without sleeping. */
static void run_turn_end(struct loop *l)
{
	struct loop_task *t = l->turn_end, *next;

	l->turn_end = NULL;
	l->turn_end_tail = &l->turn_end;
	for (; t; t = next) {
		next = t->next;
		run_task(t);
	}
}

/* --- polled rings; home loop --- */

void loop_add_poll(struct loop *l, struct loop_poll *p)
{
	ON_LOOP(l);
	p->armed = false;
	p->next = l->polls;
	l->polls = p;
}

void loop_del_poll(struct loop *l, struct loop_poll *p)
{
	ON_LOOP(l);
	if (l->poll_next == p)
		l->poll_next = p->next;
	for (struct loop_poll **at = &l->polls; *at; at = &(*at)->next)
		if (*at == p) {
			*at = p->next;
			return;
		}
}

static bool look(struct loop *l)
{
	bool any = false;

	for (struct loop_poll *p = l->polls; p; p = l->poll_next) {
		l->poll_next = p->next;
		any |= p->look(p);
	}
	return any;
}

/* True if work arrived meanwhile: do not sleep. */
static bool arm(struct loop *l, bool on)
{
	bool any = false;

	for (struct loop_poll *p = l->polls; p; p = l->poll_next) {
		l->poll_next = p->next;
		if (p->armed == on)
			continue;
		p->armed = on;
		any |= p->arm(p, on);
	}
	return any && on;
}

/* --- the turn --- */

static bool busy(struct loop *l)
{
	return l->done.head || l->ready || l->turn_end || l->quick.head || l->quit ||
		atomic_load_explicit(&l->posted, memory_order_relaxed) ||
		atomic_load_explicit(&l->pool.finished, memory_order_relaxed);
}

/* Look for up to budget ns whether work comes by itself. */
static bool look_around(struct loop *l)
{
	uint64_t until = loop_now() + l->budget;

	if (timers_next(l) < until)
		until = timers_next(l);
	l->ops->wait(l, 0);             /* what this turn queued; often it is complete at once */
	do {
		for (unsigned i = 0; i < LOOKS; i++) {
			if (l->ops->pending(l) || busy(l) || look(l)) {
				stat_add(&l->polled);
				return true;
			}
		}
	} while (loop_now() < until);
	return false;
}

static uint64_t until_timer(const struct loop *l)
{
	uint64_t due = timers_next(l), now;

	if (due == FOREVER)
		return FOREVER;
	now = loop_now();
	return due > now ? due - now : 0;
}

/* Sleep until something happens, unless something has. */
static void sleep_now(struct loop *l, uint64_t timeout)
{
	atomic_store(&l->sleeping, true);
	if (atomic_load(&l->posted) || atomic_load(&l->pool.finished) || l->done.head)
		timeout = 0;
	if (timeout)
		stat_add(&l->sleeps);
	l->ops->wait(l, timeout);
	atomic_store(&l->sleeping, false);
}

/* idle: ns from having nothing to do to the next thing to do. */
static void adapt(struct loop *l, uint64_t idle)
{
	if (!l->polls || !l->poll_max)
		return;
	if (idle < l->poll_max)
		l->budget = MIN(l->poll_max, MAX(l->budget * 2, MAX(l->poll_max / 8, BUDGET_FIRST)));
	else if (l->budget / 2 >= BUDGET_LEAST)
		l->budget /= 2;
	else
		l->budget = ++l->long_sleeps % PROBE_EVERY ? 0 : l->poll_max / 4;
}

static void turn(struct loop *l)
{
	uint64_t from, looked = 0;

	stat_add(&l->turns);
	reap(l);
	tell_ready(l);
	run_posted(l);
	timers_run(l);
	look(l);
	run_turn_end(l);
	prepare(l);
	if (busy(l)) {
		l->ops->wait(l, 0);
		return;
	}
	if (l->polls && l->budget) {
		if (look_around(l))
			return;
		looked = l->budget;
	}
	if (arm(l, true) || busy(l)) {
		l->ops->wait(l, 0);
	} else {
		from = l->polls ? loop_now() : 0;
		sleep_now(l, until_timer(l));
		adapt(l, from ? looked + loop_now() - from : 0);
	}
	arm(l, false);
}

void loop_drain(struct loop *l, const bool *done)
{
	ON_LOOP(l);
	for (;;) {
		reap(l);
		if (*done)
			return;
		prepare(l);
		atomic_store(&l->sleeping, true);
		l->ops->wait(l, l->done.head || atomic_load(&l->pool.finished) ? 0 : FOREVER);
		atomic_store(&l->sleeping, false);
	}
}

/* --- birth and death --- */

static void report_up(struct loop *l, int error)
{
	pthread_mutex_lock(&l->up_lock);
	l->up_error = error;
	l->up = true;
	pthread_cond_broadcast(&l->up_cond);
	pthread_mutex_unlock(&l->up_lock);
}

static int wait_up(struct loop *l)
{
	int r;

	pthread_mutex_lock(&l->up_lock);
	while (!l->up)
		pthread_cond_wait(&l->up_cond, &l->up_lock);
	r = l->up_error;
	pthread_mutex_unlock(&l->up_lock);
	return r;
}

/* The ring belongs to the thread that makes it (SINGLE_ISSUER), and making it is off the start path. */
static int open_engine(struct loop *l)
{
	void *spare = l->engine;        /* epoll, opened by loop_new() unless io_uring was asked for */
	int r;

	if (l->asked == LOOP_EPOLL)
		return 0;
	r = uring_engine.open(l);
	if (r && l->asked == LOOP_AUTO) {
		log_info("%s: no io_uring here (%s)", l->name, strerrordesc_np(-r));
		return 0;
	}
	if (!r)
		l->ops = &uring_engine;
	if (spare)
		epoll_engine.close(spare);
	return r;
}

static void *thread_main(void *arg)
{
	struct loop *l = arg;
	int r;

	here = l;
	pthread_setname_np(pthread_self(), l->name);
	r = open_engine(l);
	if (!r) {
		l->wake = (struct loop_event){ .fd = l->wake_fd, .fn = woken };
		r = loop_add_event(l, &l->wake);
		if (r)
			l->ops->close(l->engine);
	}
	sandbox_thread();
	report_up(l, r);
	if (r) {
		if (l->asked != LOOP_URING)     /* else loop_new() waits to say so */
			log_error("%s: cannot wait for events: %s", l->name, strerrordesc_np(-r));
		return NULL;
	}
	log_info("%s: runs on %s", l->name, l->ops->name);
	while (!l->quit)
		turn(l);
	loop_del_event(l, &l->wake);
	l->ops->close(l->engine);
	while (l->watches)
		watch_free(l->watches);
	return NULL;
}

static void release(struct loop *l)
{
	pool_stop(&l->pool);
	if (l->wake_fd >= 0)
		close(l->wake_fd);
	pthread_cond_destroy(&l->up_cond);
	pthread_mutex_destroy(&l->up_lock);
	free(l);
}

/* With every signal blocked: they are the main thread's and the vCPUs'. */
static int start_thread(struct loop *l)
{
	sigset_t all, old;
	int r;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	r = pthread_create(&l->thread, NULL, thread_main, l);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return r;
}

struct loop *loop_new(const char *name, enum loop_engine engine, unsigned poll_max_us,
	struct error *err)
{
	struct loop *l = calloc(1, sizeof(*l));
	int r;

	if (!l) {
		error_errno(err, ENOMEM, "cannot make the I/O loop");
		return NULL;
	}
	snprintf(l->name, sizeof(l->name), "%s", name);
	l->asked = engine;
	l->poll_max = poll_max_us * 1000ull;
	l->ready_tail = &l->ready;
	l->turn_end_tail = &l->turn_end;
	pthread_mutex_init(&l->up_lock, NULL);
	pthread_cond_init(&l->up_cond, NULL);
	pool_init(&l->pool);
	l->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	r = l->wake_fd < 0 ? -errno : 0;
	if (!r && engine != LOOP_URING) {
		l->ops = &epoll_engine;
		r = l->ops->open(l);
	}
	if (!r) {
		r = -start_thread(l);
		if (r && l->engine)
			l->ops->close(l->engine);
	}
	if (!r && engine == LOOP_URING) {
		r = wait_up(l);
		if (r)
			pthread_join(l->thread, NULL);
	}
	if (r) {
		error_errno(err, -r, "cannot make the I/O loop%s",
			engine == LOOP_URING ? " on io_uring (--engine auto takes epoll where io_uring is refused)" : "");
		release(l);
		return NULL;
	}
	return l;
}

static void quit(void *arg)
{
	struct loop *l = arg;

	l->quit = true;
}

void loop_free(struct loop *l)
{
	if (!l)
		return;
	if (!wait_up(l))
		loop_call(l, quit, l);
	pthread_join(l->thread, NULL);
	release(l);
}

const char *loop_engine_name(const struct loop *l)
{
	wait_up((struct loop *)l);      /* const to the caller: it only waits */
	return l->ops->name;
}

void loop_get_stats(const struct loop *l, struct loop_stats *st)
{
	*st = (struct loop_stats){ .turns = atomic_load(&l->turns), .enters = atomic_load(&l->enters),
		.sleeps = atomic_load(&l->sleeps), .polled = atomic_load(&l->polled) };
}
