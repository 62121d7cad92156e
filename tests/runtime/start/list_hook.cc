// Preloaded by race_program.py: std::list's links as Jittor's graph sets them, with a delay between reading and writing.
// Counts what Jittor's core asks for on behalf of the graph (functions of its class Node) off the main thread, and how
// often two threads were at it at once.
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace std::__detail {
struct _List_node_base {
    _List_node_base *_M_next, *_M_prev;
    void _M_hook(_List_node_base*) noexcept;
    void _M_unhook() noexcept;
};
}  // namespace std::__detail

static std::atomic<long> off_main{0}, at_once{0}, inside{0};
static long longest = 0;  // microseconds

static bool links_the_graph(void* caller) {
    Dl_info found;
    return dladdr(caller, &found) && found.dli_sname && strstr(found.dli_fname, "jittor_core") &&
        strstr(found.dli_sname, "N6jittor4Node");
}

static void delay(void* caller) {
    if (!links_the_graph(caller) || getpid() == syscall(SYS_gettid)) return;
    off_main++;
    if (inside++) at_once++;
    static thread_local unsigned random = syscall(SYS_gettid);
    random = random * 1664525 + 1013904223;
    if (longest) usleep((random >> 8) % longest);
    inside--;
}

void std::__detail::_List_node_base::_M_hook(_List_node_base* place) noexcept {
    _M_next = place;
    _M_prev = place->_M_prev;
    delay(__builtin_return_address(0));
    place->_M_prev->_M_next = this;
    place->_M_prev = this;
}

void std::__detail::_List_node_base::_M_unhook() noexcept {
    auto next = _M_next, previous = _M_prev;
    delay(__builtin_return_address(0));
    previous->_M_next = next;
    next->_M_prev = previous;
}

extern "C" {
void delay_up_to(long microseconds) { longest = microseconds; }
long calls_off_main() { return off_main; }
long calls_at_once() { return at_once; }
}
