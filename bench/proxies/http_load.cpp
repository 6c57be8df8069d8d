// A client of the null backend that costs little, straight or through a proxy, and that looks at every byte it gets.
// bench/proxy.py compiles and starts it.
//
//     http_load PORT BODY_FILE EVENTS CONNECTIONS WARM_UP_SECONDS SECONDS
//
// A closed loop: every connection posts the file to /v1/chat/completions, reads the answer to its end and posts again.
// EVENTS 0 expects REPLY; else a stream of so many events and [DONE]. It says `measuring` and `measured` when the
// window of SECONDS begins and ends, lets the requests that are under way end, and then prints what it found as one
// line of JSON: counts and times of the window, errors of the whole run.
#include <fcntl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <memory>
#include <sstream>
#include <vector>

#include "null_answers.h"
#include "sockets.h"

namespace {

constexpr int MAX_ERRORS = 100;  // then there is nothing left to measure
constexpr double DRAIN_SECONDS = 20.0;
constexpr int POLL_MS = 10;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double percentile(std::vector<float>& values, double percent) {
    if (values.empty()) return 0;
    const auto at = values.begin() + std::lround(static_cast<double>(values.size() - 1) * percent / 100);
    std::nth_element(values.begin(), at, values.end());
    return *at;
}

// What the window showed. Times in microseconds.
struct Findings {
    bool is_measuring = false;
    long num_requests = 0, num_events = 0, num_reads = 0;  // reads: those that brought an event
    std::vector<float> latencies, gaps;
    long num_errors = 0, num_altered = 0, num_reconnects = 0;
    std::string first_error;

    void fail(const std::string& why) {
        if (num_errors++ == 0) first_error = why;
    }

    void print(double seconds) {
        for (char& c : first_error)
            if (c == '"' || c == '\\' || static_cast<unsigned char>(c) < ' ') c = '\'';
        printf(R"({"seconds":%.4f,"requests":%ld,"events":%ld,"reads":%ld,)", seconds, num_requests, num_events,
               num_reads);
        printf(R"("latency_p50_us":%.1f,"latency_p99_us":%.1f,)", percentile(latencies, 50), percentile(latencies, 99));
        printf(R"("gap_p50_us":%.1f,"gap_p99_us":%.1f,)", percentile(gaps, 50), percentile(gaps, 99));
        printf(R"("errors":%ld,"altered":%ld,"reconnects":%ld,"first_error":"%s"})"
               "\n",
               num_errors, num_altered, num_reconnects, first_error.c_str());
    }
};

// Checks what comes in an answer's body, as it comes.
class Answer {
 public:
    Answer(int num_events, Findings& findings) : num_events_(num_events), findings_(findings) {}

    void begin() {
        text_.clear();
        next_event_ = 0;
        is_done_ = false;
        last_at_ = 0;
    }

    // False if these are not the bytes that were expected.
    bool take(std::string_view bytes, double at) {
        text_.append(bytes);
        if (num_events_ == 0) return true;
        const int before = next_event_;
        size_t start = 0;
        for (size_t end; (end = text_.find("\n\n", start)) != std::string::npos; start = end + 2)
            if (!take_event(std::string_view(text_).substr(start, end + 2 - start), at)) return false;
        text_.erase(0, start);
        if (findings_.is_measuring && next_event_ > before) findings_.num_reads++;
        return true;
    }

    bool end() {
        if (num_events_ == 0) {
            findings_.num_altered += text_ != REPLY;
            return text_.find("A fixed answer") != std::string::npos || fail("a wrong answer: " + text_.substr(0, 200));
        }
        if (is_done_ && text_.empty()) return true;
        return fail("a stream ended after event " + std::to_string(next_event_) + " of " + std::to_string(num_events_));
    }

 private:
    bool take_event(std::string_view event, double at) {
        if (event.front() == ':') return true;  // a comment
        if (is_done_) return fail("an event after [DONE]");
        if (event == DONE_EVENT) {
            is_done_ = true;
            return next_event_ == num_events_ || fail("[DONE] after event " + std::to_string(next_event_));
        }
        if (next_event_ >= num_events_) return fail("more events than asked for");
        if (event != chunk_event(next_event_, num_events_) && !is_altered(event)) return false;
        next_event_++;
        if (findings_.is_measuring) count(at);
        last_at_ = at;
        return true;
    }

    bool is_altered(std::string_view event) {
        char token[16];
        snprintf(token, sizeof token, "token %06d", next_event_);
        findings_.num_altered++;
        return event.find(token) != std::string_view::npos ||
               fail("in place of event " + std::to_string(next_event_) + ": " + std::string(event.substr(0, 300)));
    }

    void count(double at) {
        findings_.num_events++;
        if (last_at_ > 0) findings_.gaps.push_back(static_cast<float>((at - last_at_) * 1e6));
    }

    bool fail(const std::string& why) {
        findings_.fail(why);
        return false;
    }

    const int num_events_;
    Findings& findings_;
    std::string text_;
    int next_event_ = 0;
    bool is_done_ = false;
    double last_at_ = 0;
};

// One connection of the client: a request at a time, and the reading of its answer.
class Caller {
 public:
    enum class State { IDLE, HEAD, COUNTED, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER };

    Caller(int epoll, int port, const std::string& request, int num_events, Findings& findings)
        : epoll_(epoll), port_(port), request_(request), findings_(findings), answer_(num_events, findings) {}
    ~Caller() { disconnect(); }

    bool is_idle() const { return state_ == State::IDLE; }

    void ask() {
        if (fd_ < 0 && !connect()) return;
        state_ = State::HEAD;
        has_answer_begun_ = false;
        in_.clear();
        answer_.begin();
        asked_at_ = now();
        if (!out_.send(fd_, request_)) return lose();
        watch_out();
    }

    void handle(uint32_t events, std::string& buffer) {
        if (events & EPOLLOUT) {
            if (!out_.send_kept(fd_)) return lose();
            watch_out();
        }
        if (!(events & ~static_cast<uint32_t>(EPOLLOUT))) return;
        const ssize_t count = recv(fd_, buffer.data(), buffer.size(), 0);
        if (count < 0 && errno == EAGAIN) return;
        if (count <= 0) return lose();
        has_answer_begun_ = true;
        if (is_idle()) return give_up("bytes after the end of an answer");
        in_.append(buffer.data(), static_cast<size_t>(count));
        read(now());
    }

 private:
    bool connect() {
        fd_ = socket(AF_INET, SOCK_STREAM, 0);
        const sockaddr_in address = loopback(port_);
        if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) < 0) {
            give_up("it cannot be connected to");
            return false;
        }
        fcntl(fd_, F_SETFL, O_NONBLOCK);
        send_at_once(fd_);
        watch(epoll_, EPOLL_CTL_ADD, fd_, EPOLLIN, this);
        is_fresh_ = true;
        is_out_watched_ = false;
        return true;
    }

    void disconnect() {
        if (fd_ >= 0) close(fd_);
        fd_ = -1;
        out_.clear();
        state_ = State::IDLE;
    }

    // The connection is gone. That is no error if it was idle: servers may close those, and clients ask again then.
    void lose() {
        const bool is_stale = is_idle() || (!is_fresh_ && !has_answer_begun_);
        if (!is_stale) findings_.fail("the connection was lost within an answer");
        findings_.num_reconnects += is_stale;
        disconnect();
    }

    void give_up(const std::string& why) {
        findings_.fail(why);
        disconnect();
    }

    void watch_out() {
        if (is_out_watched_ != out_.empty()) return;
        is_out_watched_ = !is_out_watched_;
        watch(epoll_, EPOLL_CTL_MOD, fd_, is_out_watched_ ? EPOLLIN | EPOLLOUT : EPOLLIN, this);
    }

    // Goes from state to state as long as what has come in suffices.
    void read(double at) {
        std::string_view rest = in_;
        while (state_ != State::IDLE && advance(rest, at)) {
        }
        if (state_ != State::IDLE) in_.erase(0, in_.size() - rest.size());
    }

    bool advance(std::string_view& rest, double at) {
        switch (state_) {
            case State::HEAD:
                return read_head(rest);
            case State::COUNTED:
                if (!read_data(rest, at)) return false;
                finish(at);
                return false;
            case State::CHUNK_SIZE:
                return read_chunk_size(rest);
            case State::CHUNK:
                if (!read_data(rest, at)) return false;
                state_ = State::CHUNK_END;
                return true;
            case State::CHUNK_END:
                if (!read_line(rest)) return false;
                state_ = State::CHUNK_SIZE;
                return true;
            case State::TRAILER:
                if (read_line(rest)) finish(at);
                return false;
            case State::IDLE:
                return false;
        }
        return false;
    }

    bool read_head(std::string_view& rest) {
        const size_t end = rest.find("\r\n\r\n");
        if (end == std::string_view::npos) return false;
        const std::string_view head = rest.substr(0, end + 2);
        rest.remove_prefix(end + 4);
        if (head.substr(0, 12) != "HTTP/1.1 200") {
            give_up(std::string(head.substr(0, head.find("\r\n"))) + " " + std::string(rest.substr(0, 200)));
            return false;
        }
        is_last_ = says(header(head, "Connection"), "close");
        const std::string_view length = header(head, "Content-Length");
        if (says(header(head, "Transfer-Encoding"), "chunked")) {
            state_ = State::CHUNK_SIZE;
            return true;
        }
        if (length.empty()) {
            give_up("an answer without Content-Length and without chunks");
            return false;
        }
        left_ = strtoul(std::string(length).c_str(), nullptr, 10);
        state_ = State::COUNTED;
        return true;
    }

    bool read_chunk_size(std::string_view& rest) {
        const size_t end = rest.find("\r\n");
        if (end == std::string_view::npos) return false;
        left_ = strtoul(std::string(rest.substr(0, end)).c_str(), nullptr, 16);
        rest.remove_prefix(end + 2);
        state_ = left_ == 0 ? State::TRAILER : State::CHUNK;
        return true;
    }

    // True when all of the body or of the chunk was there.
    bool read_data(std::string_view& rest, double at) {
        const std::string_view data = rest.substr(0, left_);
        rest.remove_prefix(data.size());
        left_ -= data.size();
        if (!answer_.take(data, at)) {
            disconnect();
            return false;
        }
        return left_ == 0;
    }

    static bool read_line(std::string_view& rest) {
        if (rest.size() < 2) return false;
        rest.remove_prefix(2);
        return true;
    }

    void finish(double at) {
        state_ = State::IDLE;
        is_fresh_ = false;
        const bool is_good = answer_.end();
        if (is_good && findings_.is_measuring) {
            findings_.num_requests++;
            findings_.latencies.push_back(static_cast<float>((at - asked_at_) * 1e6));
        }
        findings_.num_reconnects += is_good && is_last_;
        if (!is_good || is_last_) disconnect();
    }

    const int epoll_, port_;
    const std::string& request_;
    Findings& findings_;
    Answer answer_;
    State state_ = State::IDLE;
    int fd_ = -1;
    Outgoing out_;
    std::string in_;
    size_t left_ = 0;  // of the body or of the chunk
    bool is_fresh_ = true, is_last_ = false, has_answer_begun_ = false, is_out_watched_ = false;
    double asked_at_ = 0;
};

std::string make_request(const char* body_file, int port) {
    std::ifstream file(body_file, std::ios::binary);
    if (!file) die(body_file);
    std::stringstream body;
    body << file.rdbuf();
    const std::string text = body.str();
    return "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:" + std::to_string(port) +
           "\r\nContent-Type: application/json\r\nAccept: */*\r\nUser-Agent: http_load\r\nContent-Length: " +
           std::to_string(text.size()) + "\r\n\r\n" + text;
}

void say(const char* word) {
    puts(word);
    fflush(stdout);
}

class Load {
 public:
    Load(int port, std::string request, int num_events, int num_connections) : request_(std::move(request)) {
        for (int i = 0; i < num_connections; i++)
            callers_.push_back(std::make_unique<Caller>(epoll_, port, request_, num_events, findings_));
    }

    void run(double warm_up_seconds, double seconds) {
        const double begin = now() + warm_up_seconds;
        go_on_until(begin, true);
        findings_.is_measuring = true;
        const double began = now();
        say("measuring");
        go_on_until(began + seconds, true);
        findings_.is_measuring = false;
        const double measured = now() - began;
        say("measured");
        go_on_until(now() + DRAIN_SECONDS, false);
        for (const auto& caller : callers_)
            if (!caller->is_idle()) findings_.fail("an answer did not end");
        findings_.print(measured);
    }

 private:
    // Until then, or until all callers are idle if they are not to ask again, or nothing works.
    void go_on_until(double end, bool is_asking) {
        epoll_event ready[MAX_READY];
        while (now() < end && findings_.num_errors < MAX_ERRORS) {
            bool is_idle = true;
            for (const auto& caller : callers_) {
                if (is_asking && caller->is_idle()) caller->ask();
                is_idle &= caller->is_idle();
            }
            if (is_idle && !is_asking) return;
            const int count = epoll_wait(epoll_, ready, MAX_READY, POLL_MS);
            for (int i = 0; i < count; i++) {
                auto& caller = *static_cast<Caller*>(ready[i].data.ptr);
                caller.handle(ready[i].events, buffer_);
                if (is_asking && caller.is_idle()) caller.ask();
            }
        }
    }

    const int epoll_ = epoll_create1(0);
    const std::string request_;
    Findings findings_;
    std::vector<std::unique_ptr<Caller>> callers_;
    std::string buffer_ = std::string(READ_BYTES, '\0');
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: http_load PORT BODY_FILE EVENTS CONNECTIONS WARM_UP_SECONDS SECONDS\n");
        return 2;
    }
    const int port = atoi(argv[1]);
    Load(port, make_request(argv[2], port), atoi(argv[3]), atoi(argv[4])).run(atof(argv[5]), atof(argv[6]));
}
