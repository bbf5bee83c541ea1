//! actix-web with one worker; its accept loop is a thread of its own, on the same CPU.

use actix_web::{App, HttpResponse, HttpServer, rt::System, web};

use super::{HELLO, Order, Result};

pub fn serve(order: &Order) -> Result<()> {
    let (listener, connections_max) = (order.listen()?, order.connections_max);
    System::new().block_on(async move {
        HttpServer::new(|| App::new().default_service(web::to(hello)))
            .workers(1)
            .max_connections(connections_max)
            .disable_signals()
            .listen(listener)?
            .run()
            .await
    })?;
    Ok(())
}

async fn hello() -> HttpResponse {
    HttpResponse::Ok().content_type("text/plain").body(HELLO)
}
