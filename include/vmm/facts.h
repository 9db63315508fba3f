#ifndef VMM_FACTS_H
#define VMM_FACTS_H
/* One JSON object being filled: what devices and the core say about the run. Main thread. */
#include <stdbool.h>
#include <stdint.h>
struct facts;

void facts_u64(struct facts *f, const char *key, uint64_t val);
void facts_i64(struct facts *f, const char *key, int64_t val);
void facts_f64(struct facts *f, const char *key, double val);
void facts_bool(struct facts *f, const char *key, bool val);
void facts_str(struct facts *f, const char *key, const char *val);      /* NULL: JSON null; not UTF-8: escaped */
struct facts *facts_object(struct facts *f, const char *key);           /* a child; freed with its parent */
struct facts *facts_item(struct facts *f, const char *key);             /* a new object at the end of list key */

/* Each member in the order they were added: a string as it is, all else as JSON. */
void facts_each(struct facts *f, void (*fn)(void *arg, const char *key, const char *text), void *arg);

struct facts *facts_new(void);
char *facts_text(struct facts *f);      /* the whole as JSON, one line; free() it */
void facts_free(struct facts *f);       /* the root */
#endif
