//! The page of the connections in a real browser: it shows them, and sorts and filters on clicks.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::common::browser::Browser;
use crate::common::web::get;
use crate::common::{config, connect, echo, limit, not_run, settle, start, wait_until};
use serde_json::Value;
use slipring::{Config, Connection, ListenAddr, Running, Server};

/// A hand-written form of SHA-256 would be one more thing to test: TLS has one.
fn sha256(text: &str) -> String {
    use tokio_rustls::rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256 as SUITE;
    let hash = SUITE.tls13().expect("it is of TLS 1.3").common.hash_provider;
    base64(hash.hash(text.as_bytes()).as_ref())
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for piece in bytes.chunks(3) {
        let bits = piece.iter().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
        let bits = bits << (8 * (3 - piece.len()));
        for n in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * n)) as usize & 63];
            text.push(if n <= piece.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

fn admin_of(running: &Running) -> SocketAddr {
    match running.admin_addr() {
        Some(ListenAddr::Tcp(addr)) => addr,
        other => panic!("{other:?}"),
    }
}

/// The hashes in `src/admin/pages.rs` are those of what stands in the pages.
#[test]
fn the_pages_policies_allow_what_stands_in_them_and_nothing_else() {
    let server = Server::new(config()).listen("127.0.0.1:0", echo).admin("127.0.0.1:0");
    let running = server.start().expect("the server starts");
    let admin = admin_of(&running);
    let index = crate::common::web::ask(
        admin,
        "GET / HTTP/1.1\r\nhost: localhost\r\naccept: text/html\r\n",
    );
    let page = get(admin, "/connections.html").expect("the page");
    for (reply, tags) in [(page, &["script", "style"][..]), (index.expect("the index"), &["style"])]
    {
        let policy = reply.header("content-security-policy").expect("a policy");
        for tag in tags {
            let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
            let (_, rest) = reply.body.split_once(&open).expect("it has one");
            let (inside, rest) = rest.split_once(&close).expect("it ends");
            assert!(!rest.contains(&open), "there is one {tag}");
            let wanted = format!("{tag}-src 'sha256-{}'", sha256(inside));
            assert!(policy.contains(&wanted), "{wanted} is not in {policy}");
        }
        for word in ["unsafe-", "http:", "https:", "//"] {
            assert!(!policy.contains(word), "{policy}");
        }
        // Nothing is fetched from elsewhere, nothing is made markup, no handler stands in markup.
        for word in ["src=", "href=\"http", "@import", "url(", "innerHTML", "onclick", "style=\""] {
            assert!(!reply.body.contains(word), "{word} in the page");
        }
    }
    settle(running, 0);
}

/// Connections in several states: two wait for a message, two send what nobody takes, one is new.
struct Crowd {
    idle: Vec<TcpStream>,
    sending: Vec<TcpStream>,
    fresh: TcpStream,
}

async fn answer(mut conn: Connection) -> slipring::Result<()> {
    while let Some(line) = conn.read_until(b'\n', 16).await? {
        let bytes: usize = std::str::from_utf8(&line)
            .ok()
            .and_then(|it| it.trim().parse().ok())
            .expect("a number");
        conn.send(vec![b'x'; bytes]).await?;
    }
    Ok(())
}

impl Crowd {
    fn connect(addr: SocketAddr) -> Crowd {
        let ask = |bytes: usize| {
            let mut client = connect(addr);
            client.write_all(format!("{bytes}\n").as_bytes()).expect("send");
            client
        };
        let mut idle = vec![ask(10), ask(2_000)];
        for (client, bytes) in idle.iter_mut().zip([10, 2_000]) {
            client.read_exact(&mut vec![0; bytes]).expect("the answer");
        }
        Crowd { idle, sending: vec![ask(20 << 20), ask(30 << 20)], fresh: connect(addr) }
    }

    fn all(&self) -> impl Iterator<Item = &TcpStream> {
        self.idle.iter().chain(&self.sending).chain([&self.fresh])
    }
}

/// The cells of a column, from above.
fn column(browser: &Browser, key: &str) -> Vec<String> {
    let script = format!(
        "const keys = [...document.querySelectorAll('th')].map(th => th.dataset.key);
         return [...document.querySelectorAll('#rows tr')]
             .map(tr => tr.cells[keys.indexOf('{key}')])
             .map(td => td.title.replace(/[^0-9]/g, '') || td.textContent);"
    );
    let cells = browser.run(&script);
    let cells = cells.as_array().expect("a list").iter();
    cells.map(|cell| cell.as_str().expect("text").to_owned()).collect()
}

fn text(browser: &Browser, selector: &str) -> String {
    let script = format!("return document.querySelector({selector:?}).textContent");
    browser.run(&script).as_str().expect("text").to_owned()
}

fn numbers(cells: &[String]) -> Vec<u64> {
    cells.iter().map(|cell| cell.parse().unwrap_or_else(|_| panic!("{cells:?}"))).collect()
}

#[test]
fn a_person_sees_the_connections_and_sorts_and_filters_them() {
    const TEST: &str = "a_person_sees_the_connections_and_sorts_and_filters_them";
    let browser = match Browser::start() {
        Ok(browser) => browser,
        Err(why) => return not_run(TEST, format!("no browser: {why}")),
    };
    // Its name is markup, as far as it can.
    let name = format!("unix:@<img src=x onerror=alert(1)>{}", std::process::id());
    let server = Server::new(long_lived()).listen("127.0.0.1:0", answer).listen(&name, echo);
    let (running, addr) = start(server.admin("127.0.0.1:0"));
    let (admin, handle) = (admin_of(&running), running.handle());
    let crowd = Crowd::connect(addr);
    let abstract_name = name.trim_start_matches("unix:@");
    let local = local_client(abstract_name);
    wait_until("they are all there", || {
        let list = handle.connections().expect("not on a core");
        list.len() == 6 && list.iter().filter(|it| it.bytes_queued > 0).count() == 2
    });

    browser.open(&format!("http://{admin}/connections"));
    wait_until("the rows are shown", || column(&browser, "peer").len() == 6);
    let peers = column(&browser, "peer");
    for client in crowd.all() {
        let peer = client.local_addr().expect("an address").to_string();
        assert!(peers.contains(&peer), "{peer} is not among {peers:?}");
    }
    assert_eq!(text(&browser, "#phase"), "running");
    assert_eq!(text(&browser, "#count"), "6 shown, 6 listed");
    assert!(column(&browser, "listener").contains(&name), "its name is text");
    assert_eq!(browser.run("return document.images.length"), Value::from(0));

    // The greatest first, then the least.
    browser.click("th[data-key=bytes_out] button");
    let down = numbers(&column(&browser, "bytes_out"));
    assert!(down.is_sorted_by(|a, b| a >= b) && down[0] > down[5], "{down:?}");
    browser.click("th[data-key=bytes_out] button");
    let up = numbers(&column(&browser, "bytes_out"));
    assert!(up.is_sorted() && up[0] < up[5], "{up:?}");
    let order = browser.run("return document.querySelector('th[data-key=bytes_out]').ariaSort");
    assert_eq!(order, "ascending");
    browser.click("th[data-key=state] button");
    let states = column(&browser, "state");
    assert!(states.is_sorted(), "{states:?}");
    assert_eq!(states, ["idle", "idle", "new", "new", "sending", "sending"]);

    // By a state, by words, by both, and back.
    browser.click("#states button[data-state=sending]");
    assert_eq!(column(&browser, "state"), ["sending", "sending"]);
    browser.click("#states button[data-state=sending]");
    assert_eq!(column(&browser, "state").len(), 6);
    let one = crowd.idle[0].local_addr().expect("an address").to_string();
    browser.type_into("#filter", &one);
    assert_eq!(column(&browser, "peer"), [one.as_str()]);
    browser.type_into("#filter", "ADMIN_PAGE.rs idle");
    assert_eq!(column(&browser, "state"), ["idle", "idle"], "words in any order and case");
    browser.type_into("#filter", "nobody has this");
    assert_eq!(column(&browser, "peer").len(), 0);
    assert_eq!(text(&browser, "#empty"), "No connection fits the filter.");
    keep_picture(&browser, "filtered");
    browser.run(
        "const it = document.querySelector('#filter'); it.value = '';
        it.dispatchEvent(new Event('input'))",
    );
    keep_picture(&browser, "all");

    // It is drawn again by itself, with what was chosen.
    browser.click("#every option[value='1000']");
    drop(local);
    wait_until("the one that has left is gone", || column(&browser, "peer").len() == 5);
    assert!(column(&browser, "state").is_sorted());
    assert_eq!(browser.complaints(), Value::Array(Vec::new()), "nothing was forbidden");
    handle.begin_drain(limit(2_000));
    wait_until("the drain is seen", || text(&browser, "#phase") != "running");
    drop(crowd);
    let report = running.join().expect("every core ends well");
    assert!(report.is_balanced(), "{report}");
    wait_until("the end is seen", || text(&browser, "#phase") == "no answer");
}

fn long_lived() -> Config {
    config().first_byte_ms(60_000).write_stall_ms(60_000).min_rate_bytes_per_s(0)
}

fn local_client(name: &str) -> std::os::unix::net::UnixStream {
    use std::os::linux::net::SocketAddrExt;
    let addr = std::os::unix::net::SocketAddr::from_abstract_name(name).expect("a name");
    std::os::unix::net::UnixStream::connect_addr(&addr).expect("connect")
}

/// Where `RING_TEST_PICTURES` names a folder, what the browser shows is kept there.
fn keep_picture(browser: &Browser, name: &str) {
    if let Ok(folder) = std::env::var("RING_TEST_PICTURES") {
        let picture = browser.screenshot();
        let path = std::path::Path::new(&folder).join(format!("{name}.png.base64"));
        std::fs::write(path, picture).expect("keep a picture");
    }
}
