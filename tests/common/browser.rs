//! A real browser without a window, driven over the WebDriver protocol
//! (<https://www.w3.org/TR/webdriver2/>): plain HTTP with JSON, which `chromedriver` translates.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::child::{path, tie};
use super::limit;
use super::web::ask_over;

/// A browser and its one window, which end with it.
pub struct Browser {
    driver: Child,
    addr: SocketAddr,
    session: String,
    profile: PathBuf,
}

impl Browser {
    /// Starts one with a profile of its own; why not, where that is not possible.
    pub fn start() -> Result<Browser, String> {
        let mut command = Command::new("chromedriver");
        command.arg("--port=0").env("PATH", path());
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        tie(&mut command);
        let mut driver = command.spawn().map_err(|error| format!("chromedriver: {error}"))?;
        let output = BufReader::new(driver.stdout.take().expect("its output"));
        // It says: "ChromeDriver was started successfully on port 41235."
        let said = output.lines().map_while(Result::ok);
        let port = said.filter_map(|line| {
            let rest = line.split_once("successfully on port ")?.1;
            rest.trim_end_matches('.').parse::<u16>().ok()
        });
        let Some(port) = { port }.next() else {
            let _ = driver.kill();
            let _ = driver.wait();
            return Err("chromedriver did not start".to_owned());
        };
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        let profile = std::env::temp_dir().join(format!("slipring-browser-{}", std::process::id()));
        let mut browser = Browser { driver, addr, session: String::new(), profile };
        let profile = format!("--user-data-dir={}", browser.profile.display());
        let mut arguments = FLAGS.map(str::to_owned).to_vec();
        arguments.push(profile);
        let options = json!({ "args": arguments });
        let asked = json!({ "capabilities": { "alwaysMatch": { "goog:chromeOptions": options } } });
        let session = browser.ask("POST", "/session", Some(asked))?;
        let id = session["sessionId"].as_str().ok_or_else(|| session.to_string())?;
        browser.session = format!("/session/{id}");
        Ok(browser)
    }

    pub fn open(&self, url: &str) {
        self.order("/url", json!({ "url": url }));
    }

    /// Runs the body of a function in the page, and returns what it returns.
    pub fn run(&self, script: &str) -> Value {
        self.order("/execute/sync", json!({ "script": script, "args": [] }))
    }

    /// Clicks, as a person does, on the element that the selector finds.
    pub fn click(&self, selector: &str) {
        self.order(&format!("/element/{}/click", self.find(selector)), json!({}));
    }

    /// Types into an element that was emptied before.
    pub fn type_into(&self, selector: &str, text: &str) {
        let element = self.find(selector);
        self.order(&format!("/element/{element}/clear"), json!({}));
        self.order(&format!("/element/{element}/value"), json!({ "text": text }));
    }

    /// What the browser has complained of, such as a script that a policy forbids.
    pub fn complaints(&self) -> Value {
        self.order("/se/log", json!({ "type": "browser" }))
    }

    /// A picture of the window, as PNG in base64.
    pub fn screenshot(&self) -> String {
        let path = format!("{}/screenshot", self.session);
        let shot = self.ask("GET", &path, None).expect("a picture");
        shot.as_str().expect("text").to_owned()
    }

    fn find(&self, selector: &str) -> String {
        let by = json!({ "using": "css selector", "value": selector });
        let found = self.order("/element", by);
        let ids = found.as_object().and_then(|found| found.values().next());
        ids.and_then(Value::as_str).expect("an element").to_owned()
    }

    fn order(&self, what: &str, body: Value) -> Value {
        let path = format!("{}{what}", self.session);
        self.ask("POST", &path, Some(body)).unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value, String> {
        let words = |error: std::io::Error| format!("{path}: {error}");
        let mut stream = TcpStream::connect(self.addr).map_err(words)?;
        stream.set_read_timeout(Some(limit(60_000))).map_err(words)?;
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n",
            self.addr,
            body.len()
        );
        let reply = ask_over(&mut stream, &head, &body).map_err(words)?;
        let mut answer: Value = serde_json::from_str(&reply.body).map_err(|e| e.to_string())?;
        match reply.status {
            200 => Ok(answer["value"].take()),
            _ => Err(answer["value"]["message"].to_string()),
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            let _ = self.ask("DELETE", &self.session, None);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        self.end_leftover();
        let _ = std::fs::remove_dir_all(&self.profile);
    }
}

impl Browser {
    /// A browser whose driver did not get to ending it, told by its profile.
    fn end_leftover(&self) {
        let profile = format!("--user-data-dir={}", self.profile.display());
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        for process in processes {
            let Some(id) = process.file_name().to_str().and_then(|id| id.parse().ok()) else {
                continue;
            };
            let arguments = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            if arguments.split(|byte| *byte == 0).any(|it| it == profile.as_bytes()) {
                // SAFETY: kill(2) touches no memory.
                unsafe { libc::kill(id, libc::SIGKILL) };
            }
        }
    }
}

/// It has nothing to do with other machines, and needs no sandbox for a page of ours.
const FLAGS: [&str; 9] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,900",
];
